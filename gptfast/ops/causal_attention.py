"""Fused causal attention: QK^T, mask, softmax, dropout and PV in one pass, O(T) memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast._schemas import AttentionOptions
from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops._attention_checks import OP, check_heads, check_numbers, check_options, check_tensors
from gptfast.ops._checks import check_floats, check_same_device
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import autocast
from gptfast.ops.streams import stream


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    first_row: int = 0,
    left_pad: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Any:  # Tensor, or (Tensor, Tensor) with return_lse
    """softmax(softmax_scale * q k^T + mask) v, by tiles with a running maximum and sum (Milakov and Gimelshein,
    arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135). With causal=False every query sees every key, as in BERT.

    Query i may see key j when all of these hold:
        causal:      j <= i + S - T           (T != S: the queries are the last T positions, as with cached keys)
        window:      j >  i + S - T - window  (the query's own position counts: window=1 sees itself only)
        left_pad:    j >= left_pad[b]         (keys before it are padding)
        seq_lens:    j <  seq_lens[b]         (keys from there on are padding)
        cu_seqlens:  i and j lie in the same document (B = 1, documents packed one after another)
    A query that sees no key gives output 0, gradient 0 and lse -inf (with sinks: the sink); nan or inf in keys that a query
    does not see never reach it.

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 (float64 runs in eager PyTorch). Any strides; the kernels read
            views such as `qkv.view(B, T, 3, H, D)` in place when the last dimension is contiguous. D <= 256.
        k, v: (B, H, S, D), dtype and device of q; with enable_gqa (B, Hk, S, D), H a multiple of Hk.
        sinks: (H,), any floating dtype: a logit of each query head that takes part in the softmax as one more key, whose
            value is 0 (gpt-oss). Its gradient is -sum over b and i of p_sink (out . dout). None: no sink.
        causal: whether a query sees no key after its own position.
        softmax_scale: factor of the scores, finite; None: D ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2), finite; None or 0: they stay.
        dropout_p: probability in [0, 1] of dropping an attention weight, by the Philox contract of `gptfast.rng`; matrix
            b * H + h of the mask is that of query head h, whether heads share keys or not.
        seed, offset: of the dropout mask, in [0, 2**64) and [0, 2**32): the same pair gives the same mask. A
            seed of None is drawn from torch's CPU generator, as `F.scaled_dot_product_attention` draws its mask.
        first_row: which row of the whole batch q's first one is, where q is a part of it: the mask is then that of this part.
        left_pad, seq_lens: (B,) int32 or int64, 0 to S. `gptfast.ops.real_keys` reads them from an attention mask.
        cu_seqlens: (n + 1,) int32 or int64, rising from 0 to T: document d is positions cu[d] .. cu[d + 1]. Values on a
            GPU are checked once for each tensor, which waits for the GPU. They are not checked during the capture of a
            CUDA graph or by torch.compile; the kernels then never read outside of the tensors.
        window: int >= 1 or None; needs causal=True.
        return_lse: also return the log-sum-exp of the scores (and of the sink), (B, H, T) float32, without gradient.
        enable_gqa: whether k and v may have fewer heads than q, as in `F.scaled_dot_product_attention`: query head h
            reads key head h // (H // Hk), in place. The gradients of k and v are sums over their query heads, in fp32
            and one fixed order, rounded once.
        backend: see `gptfast.backend`.
    Returns:
        (B, H, T, D) in q's dtype, stored as (B, T, H, D) so that `.transpose(1, 2).reshape(B, T, H * D)` is a view.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
    """
    check_floats(OP, q=q, k=k, v=v, sinks=sinks)
    q, k, v = autocast(q, k, v)
    if left_pad is not None or seq_lens is not None or cu_seqlens is not None:
        check_same_device(OP, q=q, left_pad=left_pad, seq_lens=seq_lens, cu_seqlens=cu_seqlens)
    check_tensors(q, k, v, sinks)
    H, D = q.shape[1], q.shape[3]
    check_heads(H, k.shape[1], enable_gqa)
    check_numbers(dropout_p, window, softmax_scale, softcap)
    scale = D**-0.5 if softmax_scale is None else float(softmax_scale)
    seed, offset = stream(OP, seed, offset, dropout_p > 0, first_row, H)
    mask = (seq_lens, cu_seqlens, causal, scale, float(dropout_p), seed, offset, window or 0, left_pad)
    options = AttentionOptions(*mask, sinks, float(softcap or 0))
    check_options(q, k, options)
    runs_on = resolve(OP, backend, q, sinks)
    if runs_on == "eager":
        return reference.attention(q, k, v, options, return_lse)
    if scale < 0:  # the kernels take the maximum of unscaled scores
        q, options = -q, options._replace(scale=-scale)
    if sinks is not None:
        options = options._replace(sinks=sinks.float())
    out, statistics = _fused(runs_on, q, k, v, *options)
    return (out, _lse(statistics, options.softcap or options.scale)) if return_lse else out


def _lse(statistics: Tensor, scale: float) -> Tensor:
    shift, level = statistics
    return torch.add(level * math.log(2), shift, alpha=scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep two numbers of each query, (2, B, H, T): its weights are exp2(scale log2(e) (q k^T - shift) - level), with a soft
    cap exp2(softcap log2(e) (tanh(scale / softcap q k^T) - shift) - level).

    Their sum, the log-sum-exp, would have a rounding error in proportion to its size, which exp would amplify in the weights.
    """
    out, statistics = output
    q, k, v, seq_lens, cu_seqlens, *numbers, left_pad, sinks, softcap = inputs  # as in AttentionOptions
    ctx.save_for_backward(q, k, v, out, statistics, seq_lens, cu_seqlens, left_pad, sinks)
    ctx.mark_non_differentiable(statistics)
    ctx.numbers, ctx.softcap = numbers, softcap


def _backward(ctx: Any, call: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, seq_lens, cu_seqlens, left_pad, sinks = ctx.saved_tensors
    options = (seq_lens, cu_seqlens, *ctx.numbers, left_pad, sinks, ctx.softcap)
    dq, dk, dv, dsinks = call("causal_attention_bwd", dout, *tensors, *options)
    return dq, dk, dv, *(None,) * (len(options) - 2), None if sinks is None else dsinks, None


def new_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) stored as (B, T, H, D)."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@register_fake("causal_attention_fwd")
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return new_heads(q), q.new_empty((2, *q.shape[:3]), dtype=torch.float32)


@register_fake("causal_attention_bwd")
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = AttentionOptions(*options).sinks
    dsinks = q.new_empty(0 if sinks is None else sinks.shape, dtype=torch.float32)
    return new_heads(q), new_heads(k), new_heads(v), dsinks


_fused = differentiable("causal_attention_fwd", _save, _backward)
forbid_double_backward(OP, "causal_attention_bwd")
