"""A decoding step's attention, over a cache of keys and values at positions that only the device knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.backend import has_kernel, kernels, resolve
from gptfast.ops._attention_checks import OP, check_heads, trusted
from gptfast.ops._registry import register_fake
from gptfast.ops.causal_attention import causal_attention, new_heads


def append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    counters: Tensor,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    enable_gqa: bool = False,
    cache_ready: bool = False,
) -> Tensor:
    """Store k and v as position `lengths[b]` of each row b of a cache, and attend from q to all positions up to there.

    No value is read on the host. The CUDA kernels do it in one call; elsewhere it is an assignment and `causal_attention`.

    Args:
        q: (B, H, 1, D), of any floating dtype: cast to that of the cache.
        k, v: (B, Hk, 1, D), the same.
        keys, values: (B, Hk, S, D), written in place.
        lengths: (B,) int64. A row whose length is S or more, which nobody uses, attends to the whole cache.
        counters: at least B * H int32 zeros on the device, for one call at a time. They are zeros again after it.
        sinks, softcap, enable_gqa: see `gptfast.ops.causal_attention`.
        cache_ready: the kernel before this one in the stream, which may still run, writes none of keys, values and lengths: they
            are read before it ends.
    Returns:
        (B, H, 1, D) of the cache's dtype, without gradients.
    """
    q, k, v = (x.to(keys.dtype) for x in (q, k, v))
    check_heads(q.shape[1], k.shape[1], enable_gqa)
    runs_on = resolve(OP, None, keys, sinks)
    if runs_on != "eager" and has_kernel("causal_attention_append", runs_on):
        sinks = None if sinks is None else sinks.float()
        run = kernels(runs_on).causal_attention_append
        scale, cap = q.shape[-1] ** -0.5, float(softcap or 0)
        return run(q, k, v, keys, values, lengths, counters, scale, sinks, cap, cache_ready)
    at, rows = lengths.clamp(max=keys.shape[2] - 1), torch.arange(len(lengths), device=lengths.device)
    for stored, new in ((keys, k), (values, v)):
        stored.transpose(1, 2).index_put_((rows, at), new.squeeze(2))  # B H D
    options: dict[str, Any] = {"softcap": softcap, "enable_gqa": enable_gqa}
    return causal_attention(q, keys, values, sinks, seq_lens=trusted(at + 1), **options)


@register_fake("causal_attention_append")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return new_heads(q)
