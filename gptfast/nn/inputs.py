"""Arguments of `GPT.forward` in the forms of transformers and nanoGPT, and padded rows.  B rows, T positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.backend import transformed

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.kv_cache import KVCache

REFUSED = {
    "token_type_ids": "a GPT knows one type of token; leave it out",
    "position_ids": "positions follow from attention_mask; leave it out",
    "past_key_values": "cache=gptfast.models.KVCache(model.config, B) holds keys and values",
    "use_cache": "cache=gptfast.models.KVCache(model.config, B) holds keys and values",
    "return_dict": "the result is the logits, or (logits, loss)",
    "output_hidden_states": "register a forward hook on model.h[n]",
    "output_attentions": "attention weights are never stored",
    "head_mask": "zero the head's part of attn.c_proj.weight",
    "logits_to_keep": "last_only=True gives the logits of the last position",
    "num_items_in_batch": "scale the loss, which is a mean over the targets that count",
}


def refuse(what: str, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise TypeError for an unsupported argument, with the supported alternative. None and False count as not given."""
    for name, value in given.items():
        if name not in reasons:
            raise TypeError(f"{what}: unexpected argument {name!r}")
        if value is not None and value is not False:
            raise TypeError(f"{what}: {name} is not taken; {reasons[name]}")


def one_of(first: str, a: Any, second: str, b: Any) -> Any:
    """The one of two arguments that was given."""
    if a is not None and b is not None:
        raise TypeError(f"GPT: {first} and {second} were both given; expected one of them")
    return b if a is None else a


def shifted(labels: Tensor, ignore_index: int, packed: Packed | None = None) -> Tensor:
    """Targets (the token after each position) from labels as in transformers (the token at each position)."""
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    return targets if packed is None else targets.masked_fill(packed.lasts, ignore_index)


def check_ids(name: str, ids: Any, dtypes: tuple[torch.dtype, ...], V: int | None, ignored: int | None = None) -> None:
    """A (B, T) tensor of token ids; values (V not None) are checked where cheap: on the CPU, not in torch.compile."""
    expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(ids, Tensor) or ids.dtype not in dtypes:
        got = f"has dtype {ids.dtype}" if isinstance(ids, Tensor) else f"is a {type(ids).__name__}"
        raise TypeError(f"GPT: {name} {got}; expected a tensor of token ids, {expected}")
    if ids.dim() != 2:
        raise ValueError(f"GPT: {name} has shape {tuple(ids.shape)}; expected (B, T) - use {name}[None] for one row")
    if V is None or torch.compiler.is_compiling() or ids.device.type != "cpu" or transformed() or ids.numel() == 0:
        return
    checked = ids if ignored is None else torch.where(ids == ignored, 0, ids)
    low, high = (int(x) for x in checked.aminmax())
    if ignored is not None and low < 0:
        raise ValueError(
            f"GPT: {name} holds {low}; expected ids in [0, {V}), or {ignored} where nothing is to be learnt - "
            f"ignore_index={low} says that {low} is that (nanoGPT takes -1)"
        )
    if low < 0 or high >= V:
        raise ValueError(
            f"GPT: {name} holds token id {high if high >= V else low}; expected ids in [0, {V}), the "
            "vocabulary of this model - was the text encoded with another tokenizer?"
        )


def check_tokens(config: GPTConfig, tokens: Any) -> None:
    """Token ids, or vectors in their places: (B, T, n_embd) floats."""
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        return check_ids("ids", tokens, (torch.int64, torch.int32), config.vocab_size)
    check_vectors("inputs_embeds", tokens, config.n_embd)


def check_form(tokens: Any, vectors: bool, C: int) -> None:
    """The dtype and the shape of what was given as ids, or as vectors (inputs_embeds)."""
    if vectors:
        return check_vectors("inputs_embeds", tokens, C)
    check_ids("ids", tokens, (torch.int64, torch.int32), None)


def check_vectors(name: str, x: Any, C: int) -> None:
    """A (B, n, C) tensor of floats."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise TypeError(f"GPT: {name} {got}; expected a tensor of floats, (B, n, {C})")
    if x.dim() != 3 or x.shape[2] != C:
        raise ValueError(
            f"GPT: {name} has shape {tuple(x.shape)}; expected (B, n, {C}), vectors as wide as the model (n_embd)"
        )


def behind(
    prefix: Tensor, tokens: Tensor, columns: dict[str, Tensor | None], ignore_index: int
) -> dict[str, Tensor | None]:
    """The arguments with a column a token, with columns for the vectors before the tokens.

    Raises:
        ValueError: as many rows of vectors as of tokens are expected.
    """
    n = prefix.shape[1]
    if prefix.shape[0] != len(tokens):
        raise ValueError(
            f"GPT: prefix_embeds has {prefix.shape[0]} rows and ids {len(tokens)}; expected equal numbers - expand one"
        )
    before = {"attention_mask": 1, "targets": ignore_index, "labels": ignore_index, "token_type_ids": 0}
    return {
        name: None if given is None else torch.nn.functional.pad(given, (n, 0), value=before[name])
        for name, given in columns.items()
    }


def without(found: Any, n: int) -> Any:
    """The logits, or (logits, loss), of a call without those of the first n positions."""
    if isinstance(found, tuple):
        return found if found[0] is None else (found[0][:, n:], found[1])
    return found[:, n:]


class Padding:
    """A padding mask. `compact` moves the tokens of each row to the front, in order, so that causal attention and positions
    are those of the row without padding; `restore` moves the results back.

    Args:
        mask: (B, T), 0 for padding.
        ids: (B, T).
    Raises:
        TypeError, ValueError: wrong type or shape of mask.
    """

    def __init__(self, mask: Any, ids: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype.is_complex:
            got = f"has dtype {mask.dtype}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
            raise TypeError(
                f"GPT: attention_mask {got}; expected a (B, T) tensor, 1 where a token counts and 0 for padding"
            )
        if mask.shape != ids.shape[:2]:
            raise ValueError(
                f"GPT: attention_mask has shape {tuple(mask.shape)} and ids {tuple(ids.shape[:2])}; expected equal "
                "shapes, (B, T) - attention is causal by itself"
            )
        self.counts = mask.to(ids.device) != 0
        self.order = (~self.counts).to(torch.uint8).argsort(dim=1, stable=True)  # (B, T), the columns of compacted rows
        self._rows = torch.arange(ids.shape[0], device=ids.device)

    def without(self, ids: Tensor) -> Tensor:
        """ids with 0 at padding, whose ids may be outside the vocabulary; or vectors (B, T, C)."""
        return ids.masked_fill(~self.counts if ids.dim() == 2 else ~self.counts[..., None], 0)

    def compact(self, ids: Tensor) -> Tensor:
        """ids (B, T), or vectors (B, T, C), with the tokens of each row at the front."""
        return ids.gather(1, self.order) if ids.dim() == 2 else ids[self._rows[:, None], self.order]

    def restore(self, x: Tensor) -> Tensor:
        """x (B, T, C) of compacted rows, moved back to the positions of their tokens."""
        return x[self._rows[:, None], self.order.argsort(dim=1)]

    def last(self, x: Tensor) -> Tensor:
        """(B, C): x of the last token of each row; x as in `restore`."""
        return x[self._rows, (self.counts.sum(1) - 1).clamp(min=0)]


class Packed:
    """Texts that lie one after another in one row.

    positions: (1, T), from 0 on in each text. lasts: (1, T), True at the last token of each. starts: (n,), where each begins.
    longest: tokens of the longest.

    Args:
        cu_seqlens: (n + 1,) int32 or int64, rising from 0 to T.
        ids: (1, T).
        limit: tokens of the longest text.
    Raises:
        TypeError, ValueError: several rows, ends that do not rise from 0 to T, or a text that is too long.
    """

    def __init__(self, cu_seqlens: Any, ids: Tensor, limit: int) -> None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            got = (
                f"has dtype {cu_seqlens.dtype}"
                if isinstance(cu_seqlens, Tensor)
                else f"is a {type(cu_seqlens).__name__}"
            )
            raise TypeError(f"GPT: cu_seqlens {got}; expected a tensor of int32 or int64")
        if ids.shape[0] != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"GPT: cu_seqlens has shape {tuple(cu_seqlens.shape)} and ids {tuple(ids.shape)}; expected (n + 1,) and one row, "
                "(1, T)"
            )
        T, lengths = ids.shape[1], cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != T or int(lengths.min()) < 1:
            raise ValueError(
                f"GPT: cu_seqlens is {cu_seqlens.tolist()[:8]}…; expected numbers that rise from 0 to T = {T}"
            )
        if int(lengths.max()) > limit:
            raise ValueError(
                f"GPT: cu_seqlens has a text of {int(lengths.max())} tokens but block_size is {limit}; cut it"
            )
        self.cu_seqlens, self.longest = cu_seqlens.to(ids.device), int(lengths.max())
        self.starts = self.cu_seqlens[:-1].long()
        starts = self.starts.repeat_interleave(self.cu_seqlens.diff().long(), output_size=T)
        places = torch.arange(T, device=ids.device)
        self.positions = (places - starts)[None]
        self.lasts = torch.zeros_like(self.positions, dtype=torch.bool)
        self.lasts[0, self.cu_seqlens[1:].long() - 1] = True


def padded(ids: Any, mask: Any, cache: KVCache | None) -> Padding:
    """The padding of a call. Raises ValueError if there is a cache too."""
    if not (isinstance(ids, Tensor) and ids.is_floating_point()):
        check_ids("ids", ids, (torch.int64, torch.int32), None)
    if cache is not None:
        raise ValueError(
            "GPT: attention_mask with a cache; its rows have lengths of their own - read each prompt without its padding, "
            "or call generate(ids, attention_mask=…)"
        )
    return Padding(mask, ids)


def packed_row(
    ids: Any, cu_seqlens: Any, padding: Padding | None, cache: KVCache | None, last_only: bool, config: GPTConfig
) -> Packed:
    """The texts of a packed row. Raises ValueError where another argument excludes it."""
    if not (isinstance(ids, Tensor) and ids.is_floating_point()):
        check_ids("ids", ids, (torch.int64, torch.int32), None)
    for name, given in (
        ("attention_mask", padding is not None),
        ("cache", cache is not None),
        ("last_only", last_only),
    ):
        if given:
            raise ValueError(
                f"GPT: cu_seqlens with {name}; packed rows have no padding and are not continued - leave one out"
            )
    return Packed(cu_seqlens, ids, config.block_size)


def check_call(
    config: GPTConfig,
    ids: Any,
    targets: Tensor | None,
    cache: KVCache | None,
    last_only: bool,
    ignore_index: int,
    packed: Packed | None,
    training: bool,
) -> None:
    """Raise TypeError or ValueError for arguments of a forward that do not fit the model or each other."""
    V, limit = config.vocab_size, config.block_size
    if cache is not None and not config.causal:
        raise ValueError("GPT: a cache with causal=False; earlier positions would see the new ones - run the whole row")
    check_tokens(config, ids)
    if ids.shape[1] == 0:
        raise ValueError("GPT: ids holds no tokens (T = 0); give at least one, such as the end-of-text token")
    if ids.shape[1] > limit and packed is None:
        raise ValueError(
            f"GPT: ids has {ids.shape[1]} positions but block_size is {limit}; keep the last {limit} "
            "(ids[:, -model.config.block_size:]) or build the model with a larger block_size"
        )
    if targets is not None:
        check_ids("targets", targets, (torch.int64,), V, ignored=ignore_index)
        if targets.shape != ids.shape[:2] or last_only:
            raise ValueError(
                f"GPT: targets has shape {tuple(targets.shape)} and ids {tuple(ids.shape[:2])} "
                f"(last_only={last_only}); expected equal shapes, targets[b, t] being the token after "
                "ids[b, t], without last_only"
            )
    if cache is not None and cache.batch_size != ids.shape[0]:
        raise ValueError(f"GPT: ids has {ids.shape[0]} rows but the cache {cache.batch_size}; they must be equal")
    if cache is not None and training:
        raise ValueError("GPT: a cache is for generation, but the model is in training mode; call model.eval()")
