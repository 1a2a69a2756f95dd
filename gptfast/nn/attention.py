"""Causal self-attention of GPT-2 as a module.  B batch, T time, C channels, H heads, D head_dim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.nn.adapted import call
from gptfast.nn.dropout import DropoutCounter
from gptfast.nn.linear import Linear
from gptfast.nn.selection import Selection

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.kv_cache import KVCache


class CausalSelfAttention(torch.nn.Module):
    """c_proj(attention(c_attn(x))) with GPT-2's parameter names, through `gptfast.ops.causal_attention`.

    Args:
        config: uses n_embd, n_head, bias, attn_pdrop and the attention pattern.
        layer: index of the layer; decides whether it is banded, and its place in a KVCache.
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.attn_pdrop = config.attn_pdrop
        self.window = config.window_of(layer)
        self.layer = layer
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.counter = DropoutCounter()

    def forward(
        self,
        x: Tensor,
        *,
        rng: tuple[int, ...] | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        adapters: Selection | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). The dropout after the projection belongs to `Block`.

        Args:
            x: (B, T, C).
            rng: (seed, offset), or with the number of x's first row in the whole batch, of the attention dropout; None takes
                the next of the module's own counter (`gptfast.ops.streams`).
            cache: keys and values of earlier positions (`KVCache.start` was called); without dropout.
            cu_seqlens: ends of the texts that a row is packed of, see `gptfast.ops.causal_attention`; B = 1.
            adapters: of this forward; None: the active ones.
        """
        B, T, _ = x.shape
        qkv = call(self.c_attn, adapters, x).view(B, T, 3, self.n_head, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # B H T D, views of one buffer
        if cache is not None:
            out = cache.attend(q, k, v, self.window)
        else:
            p = self.attn_pdrop if self.training else 0.0
            seed, offset, *row = (rng or self.counter.take()) if p > 0 else (0, 0)
            options = {"dropout_p": p, "seed": seed, "offset": offset, "cu_seqlens": cu_seqlens}
            if row:
                options["first_row"] = row[0]
            out = self.attend(q, k, v, **options)
        return call(self.c_proj, adapters, out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """(B, H, T, D) each; options of `gptfast.ops.causal_attention`."""
        return ops.causal_attention(q, k, v, window=self.window, **options)

    def extra_repr(self) -> str:
        sizes = f"n_head={self.n_head}, head_dim={self.head_dim}"
        return f"{sizes}, window={self.window}, attn_pdrop={self.attn_pdrop}"
