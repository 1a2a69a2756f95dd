"""What enters the first block of a GPT: embeddings of tokens and positions, behind soft prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.nn.adapted import call, embedded
from gptfast.nn.bidirectional import Beside
from gptfast.nn.inputs import Packed, behind, check_tokens, check_vectors, without
from gptfast.nn.kv_cache import KVCache
from gptfast.nn.norm import Norm
from gptfast.nn.position import SinusoidalEmbedding
from gptfast.nn.rotary import RotaryEmbedding, Rotation
from gptfast.nn.selection import AdapterState, Selection
from gptfast.nn.soft_prompt import Prefix, SoftPrompt, prompts_of


class Embeddings(nn.Module):
    """The part of `Transformer` before its blocks.  B batch, T time, C channels."""

    config: GPTConfig
    wte: nn.Embedding
    wpe: nn.Embedding | SinusoidalEmbedding  # of a model without rotary positions
    rotary: RotaryEmbedding  # of one with them
    wse: nn.Embedding | None  # of types of tokens
    ln_e: Norm | None
    adapters: AdapterState | None
    _selection: Callable[..., Selection | None]

    def _enter(
        self,
        tokens: Tensor,
        cache: KVCache | None,
        adapters: Selection | None,
        packed: Packed | None,
        prefix: Prefix | None,
        beside: Beside | None = None,
    ) -> tuple[Tensor, Rotation | None]:
        """What enters the first block, (B, T, C), or with virtual tokens; and its rotary positions, if the model has these.

        tokens: (B, T) ids, or (B, T, C) vectors in the places of their embeddings.
        """
        if prefix is None:
            positions = packed.positions if packed else None if cache is None else cache.start(tokens.shape[1])
            positions = positions if beside is None or beside.positions is None else beside.positions
            x = self._embedded(tokens, positions, adapters)
        else:
            x, positions = self._prefixed(tokens, prefix, cache, adapters)
        if self.wse is not None:
            types = None if beside is None else beside.types
            x = x + (self.wse.weight[0] if types is None else ops.embedding(types, self.wse.weight))
        x = x if self.ln_e is None else call(self.ln_e, adapters, x)
        return x, self.rotary(positions) if self.config.position_embedding == "rotary" else None

    def _prefix(self, ids: Tensor, adapters: Selection | None, packed: Packed | None) -> Prefix | None:
        """The soft prompts of this forward. Raises ValueError where they leave no room for the tokens."""
        prefix = Prefix.of(prompts_of(self), adapters, len(ids), packed)
        if prefix is not None:
            prefix.check_room(ids.shape[1] if packed is None else packed.longest, self.config.block_size)
        return prefix

    def _prefixed(
        self, tokens: Tensor, prefix: Prefix, cache: KVCache | None, adapters: Selection | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings with soft prompts before them, but where the rows of a cache have theirs; and the positions of all."""
        T = tokens.shape[1]
        virtual = None if cache is None else prefix.continues(cache)
        if cache is not None:
            places = cache.start(T + (0 if virtual else prefix.longest), virtual)
            if virtual:
                return self._embedded(tokens, places, adapters), places
        embeddings = self._embedded(tokens, prefix.positions(T, tokens.device), adapters)
        return prefix.put(self._embed_prompt, embeddings), prefix.all_positions

    def _embed_prompt(self, prompt: SoftPrompt) -> Tensor:
        """(1, n, C)."""
        ids = torch.arange(len(prompt), device=prompt.embedding.weight.device)[None]
        return self._embed(ids, None, prompt.embedding.weight.to(self.wte.weight.dtype))

    def _embedded(self, tokens: Tensor, positions: Tensor | None, adapters: Selection | None) -> Tensor:
        """`_embed` with the token embeddings that these adapters have."""
        if adapters is None or tokens.is_floating_point():
            return self._embed(tokens, positions)
        return embedded(self._embed, self.wte, adapters, tokens, positions)

    def _embed(self, tokens: Tensor, positions: Tensor | None, table: Tensor | None = None) -> Tensor:
        """Token plus position embedding, (B, T, C). table: (V, C), None for `wte`."""
        table = self.wte.weight if table is None else table
        if tokens.is_floating_point():
            return self._placed(tokens.to(table.dtype), positions)
        if self.config.position_embedding == "learned":
            return ops.embedding(tokens, table, self.wpe.weight, positions)
        return self._placed(ops.embedding(tokens, table), positions)

    def _placed(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """x (B, T, C), with the positions that are added."""
        if self.config.position_embedding == "rotary":
            return x
        places = self.wpe.weight[: x.shape[1]] if positions is None else self.wpe.weight[positions]
        if self.config.position_embedding == "learned":
            return x + places
        scale = math.sqrt(self.config.n_embd)  # Vaswani et al., section 3.4: or 0.02 would drown in sinusoids of 1
        return x * scale + places

    def _behind(self, prefix: Tensor, tokens: Any, columns: dict[str, Tensor | None], **options: Any) -> Any:
        """The forward of tokens behind vectors; see `forward`.

        prefix: (B, n, C). columns: the arguments that have a column a token. options: the others.
        """
        check_vectors("prefix_embeds", prefix, self.config.n_embd)
        check_tokens(self.config, tokens)
        columns = behind(prefix, tokens, columns, options["ignore_index"])
        if options["cu_seqlens"] is not None:
            raise ValueError("GPT: prefix_embeds with cu_seqlens; put the vectors of each text into inputs_embeds")
        if not tokens.is_floating_point():
            tokens = self._vectors(tokens, self._selection(options["adapter_names"], len(tokens), 0, 0))
        found = self(inputs_embeds=torch.cat((prefix.to(tokens.dtype), tokens), 1), **columns, **options)
        return found if options["last_only"] else without(found, prefix.shape[1])

    def _vectors(self, ids: Tensor, adapters: Selection | None) -> Tensor:
        """The token embeddings alone, (B, T, C)."""

        def look_up(ids: Tensor, _: Any, table: Tensor) -> Tensor:
            return ops.embedding(ids, table)

        if adapters is None:
            return look_up(ids, None, self.wte.weight)
        return embedded(look_up, self.wte, adapters, ids, None)

    def virtual_tokens(self, adapter: str | None = None) -> int:
        """Number of virtual tokens before those of a row. adapter: of the row; None: the active ones."""
        prompts, state = prompts_of(self), self.adapters
        if state is None or not state.enabled:
            return 0
        names = state.active if adapter is None else (adapter,)
        return max((len(prompts[name]) for name in names if name in prompts), default=0)
