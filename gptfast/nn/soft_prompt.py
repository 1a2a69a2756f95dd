"""Soft prompts: learned vectors before the embeddings of a row's tokens (Lester et al., arXiv 2104.08691).

B rows, T tokens, C channels, n virtual tokens of a row, N of the row with most, D texts in a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gptfast.nn.adapted import PROMPTS
from gptfast.nn.inputs import Packed, Padding
from gptfast.nn.kv_cache import KVCache
from gptfast.nn.selection import Selection, check_one_prompt


class SoftPrompt(nn.Module):
    """One soft prompt, with the parameter `embedding.weight` as in peft: (n, C)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        n, C = weight.shape
        self.embedding = nn.Embedding(n, C, _weight=weight)

    def __len__(self) -> int:
        return self.embedding.num_embeddings


def prompts_of(model: nn.Module) -> dict[str, SoftPrompt]:
    """The soft prompts that a model has, by the name of their adapter."""
    held = cast(nn.ModuleDict, model._modules.get(PROMPTS))
    return {name: cast(SoftPrompt, held[name]) for name in held or ()}


def one_prompt(op: str, names: tuple[str, ...], prompts: dict[str, SoftPrompt]) -> SoftPrompt | None:
    """The soft prompt among adapters that are active together. Raises ValueError for several."""
    own = [name for name in names if name in prompts]
    check_one_prompt(op, own)
    return prompts[own[0]] if own else None


@dataclass(frozen=True)
class Span:
    """Rows of a batch under the same soft prompt, or under none."""

    first: int
    last: int
    prompt: SoftPrompt | None

    @property
    def n(self) -> int:
        return 0 if self.prompt is None else len(self.prompt)


class Prefix:
    """The soft prompts of one forward.

    A row is laid out as its n virtual tokens, its T tokens, and N - n positions that nothing sees, for attention is causal. So
    a forward computes N + T positions a row. A packed row has the virtual tokens before each of its texts, and nothing else.

    Args:
        spans: which rows have which prompt, in order.
        packed: of a row that is packed.
    """

    def __init__(self, spans: tuple[Span, ...], packed: Packed | None = None) -> None:
        self.spans, self.packed = spans, packed
        self.longest = max(span.n for span in spans)
        self.cu_seqlens: Tensor | None = None
        self.all_positions: Tensor | None = None  # of a packed row with its virtual tokens; of others: from 0 on
        if packed is not None:
            self._pack(packed)

    @staticmethod
    def of(
        prompts: dict[str, SoftPrompt], adapters: Selection | None, rows: int, packed: Packed | None
    ) -> Prefix | None:
        """The soft prompts of these adapters for `rows` rows; None: no row has one."""
        if not prompts or adapters is None:
            return None
        parts = [(part, one_prompt("GPT", part.names, prompts)) for part in adapters.parts]
        spans = tuple(Span(part.first, part.last, own) if adapters.rows else Span(0, rows, own) for part, own in parts)
        return Prefix(spans, packed) if any(span.n for span in spans) else None

    def check_room(self, T: int, block_size: int) -> None:
        """Raise ValueError where T tokens do not fit behind the longest prompt."""
        if self.longest + T > block_size:
            raise ValueError(
                f"GPT: the soft prompt has {self.longest} virtual tokens and ids {T} positions, together {self.longest + T}, but "
                f"block_size is {block_size}; give at most {block_size - self.longest} tokens a row"
            )

    def _rows(self) -> Iterator[int]:
        """n of each row."""
        for span in self.spans:
            yield from [span.n] * (span.last - span.first)

    def continues(self, cache: KVCache) -> list[int] | None:
        """The virtual tokens that each row of a cache has; None: all rows are empty and get them now.

        Raises:
            ValueError: rows of both kinds, of which an empty one is to get some.
        """
        lengths, n = cache.lengths.tolist(), list(self._rows())
        if not any(lengths):
            return None
        if any(own and not length for own, length in zip(n, lengths, strict=True)):
            raise ValueError(
                f"GPT: cache has rows of {lengths} tokens; a row without tokens gets its soft prompt, so read the prompts of "
                "new rows in a call of their own (KVCache.rows)"
            )
        return n

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions of the tokens of rows that get their prompts now, (T,), or (B, T) where the prompts have different lengths."""
        if self.packed is not None:
            return self.packed.positions + self.longest
        places = torch.arange(T, device=device)
        if len(self.spans) == 1:
            return places + self.longest
        return places + torch.tensor(list(self._rows()), device=device)[:, None]

    def put(self, embed: Callable[[SoftPrompt], Tensor], x: Tensor) -> Tensor:
        """Embeddings with the prompts before them.

        Args:
            embed: makes the embeddings of a prompt with its positions, (1, n, C).
            x: (B, T, C), of the tokens.
        Returns:
            (B, N + T, C), or (1, D n + T, C) of a packed row.
        """
        if self.packed is not None:
            (span,) = self.spans
            assert span.prompt is not None
            return torch.cat((embed(span.prompt).to(x.dtype), x), 1)[:, self._order]
        return torch.cat([self._put(embed, x[span.first : span.last], span) for span in self.spans])

    def _put(self, embed: Callable[[SoftPrompt], Tensor], x: Tensor, span: Span) -> Tensor:
        parts = [x]
        if span.prompt is not None:
            parts.insert(0, embed(span.prompt).to(x.dtype).expand(x.shape[0], -1, -1))
        if span.n < self.longest:
            parts.append(x.new_zeros(x.shape[0], self.longest - span.n, x.shape[2]))
        return torch.cat(parts, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """x (B, N + T, C) of the tokens, (B, T, C)."""
        if self.packed is not None:
            return x[:, self._places]
        T = x.shape[1] - self.longest
        parts = [x[span.first : span.last, span.n : span.n + T] for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def ends(self, x: Tensor) -> Tensor:
        """x (B, N + T, C) at the last virtual token of each row, (B, 1, C), or of each packed text, (1, D, C). For a row
        without a prompt: at any token."""
        if self.packed is not None:
            return x[:, self._places[self.packed.starts] - 1]
        parts = [x[span.first : span.last, max(span.n - 1, 0), None] for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def firsts(self, labels: Tensor, padding: Padding | None, ignore_index: int) -> Tensor:
        """What the last virtual tokens predict, in the shape of `ends`: the label of each first token; or ignore_index."""
        if self.packed is not None:
            return labels[:, self.packed.starts]
        if padding is None:
            first = labels[:, :1]
        else:
            first = labels.gather(1, padding.counts.to(torch.uint8).argmax(1, keepdim=True))
            first = first.masked_fill(~padding.counts.any(1, keepdim=True), ignore_index)
        bare = torch.tensor([n == 0 for n in self._rows()], device=labels.device)
        return first.masked_fill(bare[:, None], ignore_index)

    def _pack(self, packed: Packed) -> None:
        """The order of a packed row's positions, and the ends of its texts."""
        (T,), n, device = packed.positions.shape[1:], self.longest, packed.cu_seqlens.device
        cu_seqlens, starts = packed.cu_seqlens.long(), packed.starts
        texts = torch.arange(len(starts), device=device)
        tokens = torch.arange(T, device=device)
        self._places = tokens + n * (1 + texts.repeat_interleave(cu_seqlens.diff(), output_size=T))
        virtual = torch.arange(n, device=device)
        self._order = torch.empty(T + n * len(starts), dtype=torch.int64, device=device)
        self._order[self._places] = tokens + n
        places = ((starts + n * texts)[:, None] + virtual).flatten()
        self._order[places] = virtual.repeat(len(starts))
        self.all_positions = torch.empty_like(self._order)
        self.all_positions[self._places], self.all_positions[places] = packed.positions[0] + n, self._order[places]
        self.cu_seqlens = packed.cu_seqlens + n * torch.arange(
            len(cu_seqlens), device=device, dtype=packed.cu_seqlens.dtype
        )
