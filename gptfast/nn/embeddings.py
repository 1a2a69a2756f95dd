"""What enters the first block of a GPT: embeddings of tokens and positions, behind soft prompts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.nn.adapted import embedded
from gptfast.nn.inputs import Packed
from gptfast.nn.kv_cache import KVCache
from gptfast.nn.position import SinusoidalEmbedding
from gptfast.nn.selection import AdapterState, Selection
from gptfast.nn.soft_prompt import Prefix, SoftPrompt, prompts_of


class Embeddings(nn.Module):
    """The part of `Transformer` before its blocks.  B batch, T time, C channels."""

    config: GPTConfig
    wte: nn.Embedding
    wpe: nn.Embedding | SinusoidalEmbedding
    adapters: AdapterState | None

    def _prefix(self, ids: Tensor, adapters: Selection | None, packed: Packed | None) -> Prefix | None:
        """The soft prompts of this forward. Raises ValueError where they leave no room for the tokens."""
        prefix = Prefix.of(prompts_of(self), adapters, len(ids), packed)
        if prefix is not None:
            prefix.check_room(ids.shape[1] if packed is None else packed.longest, self.config.block_size)
        return prefix

    def _prefixed(self, ids: Tensor, prefix: Prefix, cache: KVCache | None, adapters: Selection | None) -> Tensor:
        """Embeddings with soft prompts before them, but where the rows of a cache have theirs."""
        T = ids.shape[1]
        virtual = None if cache is None else prefix.continues(cache)
        if cache is not None:
            places = cache.start(T + (0 if virtual else prefix.longest), virtual)
            if virtual:
                return self._embedded(ids, places, adapters)
        return prefix.put(self._embed_prompt, self._embedded(ids, prefix.positions(T, ids.device), adapters))

    def _embed_prompt(self, prompt: SoftPrompt) -> Tensor:
        """(1, n, C)."""
        ids = torch.arange(len(prompt), device=prompt.embedding.weight.device)[None]
        return self._embed(ids, None, prompt.embedding.weight.to(self.wte.weight.dtype))

    def _embedded(self, ids: Tensor, positions: Tensor | None, adapters: Selection | None) -> Tensor:
        """`_embed` with the token embeddings that these adapters have."""
        if adapters is None:
            return self._embed(ids, positions)
        return embedded(self._embed, self.wte, adapters, ids, positions)

    def _embed(self, ids: Tensor, positions: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        """Token plus position embedding, (B, T, C). tokens: (V, C), None for `wte`."""
        tokens = self.wte.weight if tokens is None else tokens
        if self.config.position_embedding == "learned":
            return ops.embedding(ids, tokens, self.wpe.weight, positions)
        sinusoids = self.wpe.weight[: ids.shape[1]] if positions is None else self.wpe.weight[positions]
        scale = math.sqrt(self.config.n_embd)  # Vaswani et al., section 3.4: or 0.02 would drown in sinusoids of 1
        return ops.embedding(ids, tokens) * scale + sinusoids

    def virtual_tokens(self, adapter: str | None = None) -> int:
        """Number of virtual tokens before those of a row. adapter: of the row; None: the active ones."""
        prompts, state = prompts_of(self), self.adapters
        active = state.active if state is not None and state.enabled else ()
        names = active if adapter is None else (adapter,)
        return max((len(prompts[name]) for name in names if name in prompts), default=0)
