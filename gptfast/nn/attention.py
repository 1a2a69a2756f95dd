"""Self-attention of a GPT, and of a BERT, as a module.  B batch, T time, C channels, H heads, K heads of keys, D head_dim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.nn.adapted import call
from gptfast.nn.dropout import DropoutCounter
from gptfast.nn.linear import Linear
from gptfast.nn.norm import head_norm_of
from gptfast.nn.rotary import Rotation
from gptfast.nn.selection import Selection

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.kv_cache import KVCache


class CausalSelfAttention(torch.nn.Module):
    """c_proj(attention(c_attn(x))) with GPT-2's parameter names, through `gptfast.ops.causal_attention`.

    The rows of c_attn are those of all queries, then keys, then values. With a config whose `causal` is False every position
    sees all of its row.

    Args:
        config: uses n_embd, the heads, the biases, attn_pdrop, the attention pattern, and what else it says of attention.
        layer: index of the layer; decides whether it is banded, and its place in a KVCache.
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.heads_a_key = config.n_head // config.kv_heads
        self.attn_pdrop = config.attn_pdrop
        self.window = config.window_of(layer)
        self.softcap, self.causal = config.attn_softcap, config.causal
        self.layer = layer
        self.c_attn = Linear(config.n_embd, config.qkv_dim, bias=config.has_bias("attn"))
        self.c_proj = Linear(config.attn_dim, config.n_embd, bias=config.has_bias("attn_out"))
        self.q_norm, self.k_norm = head_norm_of(config), head_norm_of(config)
        self.sinks = torch.nn.Parameter(torch.zeros(config.n_head)) if config.attention_sinks else None
        self.rotary = config if config.position_embedding == "rotary" else None
        self.counter = DropoutCounter()

    def forward(
        self,
        x: Tensor,
        *,
        rng: tuple[int, ...] | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        adapters: Selection | None = None,
        rotation: Rotation | None = None,
        seq_lens: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). The dropout after the projection belongs to `Block`.

        Args:
            x: (B, T, C).
            rng: (seed, offset), or with the number of x's first row in the whole batch, of the attention dropout; None takes
                the next of the module's own counter (`gptfast.ops.streams`).
            cache: keys and values of earlier positions (`KVCache.start` was called); without dropout.
            cu_seqlens: ends of the texts that a row is packed of, see `gptfast.ops.causal_attention`; B = 1.
            adapters: of this forward; None: the active ones.
            rotation: rotary positions of this forward; None: positions from 0 on, where the config has such.
            seq_lens: (B,) how many tokens each row begins with, if the rest is padding that none is to see; None: all T.
        """
        if self.rotary is not None and rotation is None and cache is not None:
            raise TypeError("CausalSelfAttention: rotation is None beside a cache; give that of the new positions")
        qkv = call(self.c_attn, adapters, x)
        if cache is not None:
            return call(self.c_proj, adapters, self.attend_cached(qkv, cache, rotation))
        q, k, v = self.queries_keys_values(qkv, rotation)
        p = self.attn_pdrop if self.training else 0.0
        seed, offset, *row = (rng or self.counter.take()) if p > 0 else (0, 0)
        options = self._options() | {"dropout_p": p, "seed": seed, "offset": offset, "cu_seqlens": cu_seqlens}
        options |= {} if seq_lens is None else {"seq_lens": seq_lens}
        options |= {} if self.causal else {"causal": False}
        if row:
            options["first_row"] = row[0]
        out = self.attend(q, k, v, **options)
        return call(self.c_proj, adapters, out.transpose(1, 2).flatten(2))

    def attend_cached(self, qkv: Tensor, cache: KVCache, rotation: Rotation | None) -> Tensor:
        """What c_proj takes of new positions, (B, T, H D), whose keys and values are stored. qkv: as `queries_keys_values`."""
        q, k, v = self.queries_keys_values(qkv, rotation)
        return cache.attend(q, k, v, self.window, **self._options()).transpose(1, 2).flatten(2)

    def _options(self) -> dict[str, Any]:
        """Of `gptfast.ops.causal_attention`, with a cache or without."""
        options: dict[str, Any] = {} if self.sinks is None else {"sinks": self.sinks}
        options |= {} if self.softcap is None else {"softcap": self.softcap}
        return options if self.heads_a_key == 1 else options | {"enable_gqa": True}

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head // self.heads_a_key

    def queries_keys_values(self, qkv: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What attention takes: q (B, H, T, D), k and v (B, K, T, D), normalised and rotated.

        Args:
            qkv: (B, T, (H + 2 K) D), what c_attn gives.
            rotation: as in `forward`.
        """
        B, T, _ = qkv.shape
        H, K = self.n_head, self.kv_heads
        q, k, v = qkv.view(B, T, H + 2 * K, self.head_dim).split((H, K, K), 2)  # views of one buffer
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H T D
        if self.rotary is not None:
            rotation = rotation or Rotation.of(self.rotary, T, q.device)
            q, k = rotation.rotate(q), rotation.rotate(k)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """(B, H, T, D) and (B, K, T, D); options of `gptfast.ops.causal_attention`."""
        return ops.causal_attention(q, k, v, window=self.window, **options)

    def extra_repr(self) -> str:
        sizes = f"n_head={self.n_head}, head_dim={self.head_dim}"
        shared = f", kv_heads={self.kv_heads}" if self.kv_heads != self.n_head else ""
        return f"{sizes}{shared}, window={self.window}, attn_pdrop={self.attn_pdrop}"
