"""Fused causal attention: QK^T, mask, softmax, dropout and PV in one pass, O(T) memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gptfast._schemas import AttentionOptions
from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_int, check_number, check_probability, check_same_device
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import autocast
from gptfast.ops.streams import stream

OP = "causal_attention"
# Attributes of lengths on a GPU: the version, limit and check that they passed; whether `trusted` marked them.
_FOUND_RIGHT, _TRUSTED = "_gptfast_found_right", "_gptfast_trusted"


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    first_row: int = 0,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Any:  # Tensor, or (Tensor, Tensor) with return_lse
    """softmax(softmax_scale * q k^T + mask) v, by tiles with a running maximum and sum (Milakov and Gimelshein,
    arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135).

    Query i may see key j when all of these hold:
        causal:      j <= i + S - T           (T != S: the queries are the last T positions, as with cached keys)
        window:      j >  i + S - T - window  (the query's own position counts: window=1 sees itself only)
        seq_lens:    j <  seq_lens[b]         (keys after a row's length are padding)
        cu_seqlens:  i and j lie in the same document (B = 1, documents packed one after another)
    A query that sees no key gives output 0, gradient 0 and lse -inf; nan or inf in keys that a query does not see
    never reach it.

    Args:
        q: (B, H, T, D), float32, bfloat16, float16 (float64 runs in eager PyTorch). Any strides; the kernels read
            views such as `qkv.view(B, T, 3, H, D)` in place when the last dimension is contiguous. D <= 256.
        k, v: (B, H, S, D), dtype and device of q; with enable_gqa (B, Hk, S, D), H a multiple of Hk.
        softmax_scale: factor of the scores, finite; None: D ** -0.5.
        dropout_p: probability in [0, 1] of dropping an attention weight, by the Philox contract of `gptfast.rng`; matrix
            b * H + h of the mask is that of query head h, whether heads share keys or not.
        seed, offset: of the dropout mask, in [0, 2**64) and [0, 2**32): the same pair gives the same mask. A
            seed of None is drawn from torch's CPU generator, as `F.scaled_dot_product_attention` draws its mask.
        first_row: which row of the whole batch q's first one is, where q is a part of it: the mask is then that of this part.
        seq_lens: (B,) int32 or int64, 0 <= seq_lens[b] <= S.
        cu_seqlens: (n + 1,) int32 or int64, rising from 0 to T: document d is positions cu[d] .. cu[d + 1]. Values on a
            GPU are checked once for each tensor, which waits for the GPU. They are not checked during the capture of a
            CUDA graph or by torch.compile; the kernels then never read outside of the tensors.
        window: int >= 1 or None; needs causal=True.
        return_lse: also return the log-sum-exp of the scores, (B, H, T) float32, without gradient.
        enable_gqa: whether k and v may have fewer heads than q, as in `F.scaled_dot_product_attention`: query head h
            reads key head h // (H // Hk), in place. The gradients of k and v are sums over their query heads, in fp32
            and one fixed order, rounded once.
        backend: see `gptfast.backend`.
    Returns:
        (B, H, T, D) in q's dtype, stored as (B, T, H, D) so that `.transpose(1, 2).reshape(B, T, H * D)` is a view.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
    """
    check_float(OP, q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    _check_tensors(q, k, v, seq_lens=seq_lens, cu_seqlens=cu_seqlens)
    _check_heads(q.shape[1], k.shape[1], enable_gqa)
    check_probability(OP, "dropout_p", dropout_p)
    if window is not None:
        check_int(OP, "window", window, 1)
    if softmax_scale is not None:
        check_number(OP, "softmax_scale", softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    seed, offset = stream(OP, seed, offset, dropout_p > 0, first_row, q.shape[1])
    options = AttentionOptions(seq_lens, cu_seqlens, causal, scale, float(dropout_p), seed, offset, window or 0)
    _check_options(q, k, options)
    runs_on = resolve(OP, backend, q)
    if runs_on == "eager":
        return reference.attention(q, k, v, options, return_lse)
    if scale < 0:  # the kernels take the maximum of unscaled scores
        q, options = -q, options._replace(scale=-scale)
    out, statistics = _fused(runs_on, q, k, v, *options)
    return (out, _lse(statistics, options.scale)) if return_lse else out


def _lse(statistics: Tensor, scale: float) -> Tensor:
    shift, level = statistics
    return torch.add(level * math.log(2), shift, alpha=scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep two numbers of each query, (2, B, H, T): its weights are exp2(scale log2(e) (q k^T - shift) - level).

    Their sum, the log-sum-exp, would have a rounding error in proportion to its size, which exp would amplify in the weights.
    """
    out, statistics = output
    ctx.save_for_backward(*inputs[:3], out, statistics, *inputs[3:5])  # the last two are the lengths
    ctx.mark_non_differentiable(statistics)
    ctx.options = inputs[5:]


def _backward(ctx: Any, call: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradients = call("causal_attention_bwd", dout, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * len(AttentionOptions._fields)


def _new_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) stored as (B, T, H, D)."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@register_fake("causal_attention_fwd")
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _new_heads(q), q.new_empty((2, *q.shape[:3]), dtype=torch.float32)


@register_fake("causal_attention_bwd")
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads(q), _new_heads(k), _new_heads(v)


_fused = differentiable("causal_attention_fwd", _save, _backward)
forbid_double_backward(OP, "causal_attention_bwd")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, **lengths: Tensor | None) -> None:
    check_same_device(OP, q=q, k=k, v=v, **lengths)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{OP}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal")
    if q.dim() != 4:
        raise ValueError(f"{OP}: q has shape {tuple(q.shape)}; expected (B, H, T, D)")
    if k.shape != v.shape or k.dim() != 4:
        raise ValueError(f"{OP}: k has shape {tuple(k.shape)} and v {tuple(v.shape)}; expected equal (B, H, S, D)")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{OP}: k has batch {k.shape[0]} but q has {q.shape[0]}; they must be equal")
    if k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{OP}: k has head_dim {k.shape[3]} but q has {q.shape[3]}; they must be equal - check the c_attn split"
        )
    if not 1 <= q.shape[3] <= 256:
        raise ValueError(f"{OP}: head_dim is {q.shape[3]}; expected 1 to 256 - use more heads")


def _check_heads(H: int, key_heads: int, enable_gqa: bool) -> None:
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"{OP}: enable_gqa is {enable_gqa!r} ({type(enable_gqa).__name__}); expected True or False")
    if key_heads == H:
        return
    if not enable_gqa:
        raise ValueError(
            f"{OP}: k has {key_heads} heads but q has {H}; they must be equal - "
            "where groups of query heads share a key head pass enable_gqa=True"
        )
    if not 1 <= key_heads <= H or H % key_heads:
        raise ValueError(
            f"{OP}: k has {key_heads} heads but q has {H}; with enable_gqa=True the heads of q must be a multiple of k's"
        )


def _check_options(q: Tensor, k: Tensor, options: AttentionOptions) -> None:
    """Check the options that depend on the tensors or on each other."""
    if not math.isfinite(options.scale):
        raise ValueError(f"{OP}: softmax_scale is {options.scale}; expected a finite number")
    if options.window and not options.causal:
        raise ValueError(f"{OP}: window is {options.window} with causal={options.causal}; a window needs causal=True")
    if options.seq_lens is not None or options.cu_seqlens is not None:
        _check_lengths(q, k, options.seq_lens, options.cu_seqlens)


def _check_lengths(q: Tensor, k: Tensor, seq_lens: Tensor | None, cu_seqlens: Tensor | None) -> None:
    for name, lengths in (("seq_lens", seq_lens), ("cu_seqlens", cu_seqlens)):
        if lengths is not None and (lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64)):
            raise TypeError(
                f"{OP}: {name} has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; "
                "expected a vector of int32 or int64"
            )
    if cu_seqlens is not None and cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{OP}: cu_seqlens is empty; expected offsets from 0 to T = {q.shape[2]}, one more than documents"
        )
    if seq_lens is not None and seq_lens.shape[0] != q.shape[0]:
        raise ValueError(
            f"{OP}: seq_lens has {seq_lens.shape[0]} entries for a batch of {q.shape[0]}; expected one per row"
        )
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[2] != k.shape[2]):
        raise ValueError(
            f"{OP}: cu_seqlens needs packed documents, B = 1 and T = S; "
            f"got B = {q.shape[0]}, T = {q.shape[2]}, S = {k.shape[2]}"
        )
    if seq_lens is not None:
        _check_values(seq_lens, k.shape[2], _check_seq_lens)
    if cu_seqlens is not None:
        _check_values(cu_seqlens, q.shape[2], _check_cu_seqlens)


def trusted(seq_lens: Tensor) -> Tensor:
    """Mark lengths as valid: their values are not checked on a GPU, which would need a sync."""
    if not torch.compiler.is_compiling():
        setattr(seq_lens, _TRUSTED, True)
    return seq_lens


def _check_values(lengths: Tensor, limit: int, check: Callable[[list[int], int], None]) -> None:
    """Skipped while tracing or capturing. On a GPU once for each tensor, else every layer would wait for the GPU."""
    if torch.compiler.is_compiling() or type(lengths) is not Tensor or lengths.device.type == "meta":
        return
    if lengths.device.type == "cpu":
        check(lengths.tolist(), limit)
    elif not getattr(lengths, _TRUSTED, False):
        _check_once(lengths, limit, check)


def _check_once(lengths: Tensor, limit: int, check: Callable[[list[int], int], None]) -> None:
    state = None if lengths.is_inference() else (lengths._version, limit, check)
    if state is None or getattr(lengths, _FOUND_RIGHT, None) != state:
        if torch.cuda.is_current_stream_capturing():
            return
        check(lengths.tolist(), limit)
        setattr(lengths, _FOUND_RIGHT, state)


def _check_seq_lens(values: list[int], S: int) -> None:
    for n, length in enumerate(values):
        if not 0 <= length <= S:
            raise ValueError(f"{OP}: seq_lens[{n}] is {length}; expected 0 to S = {S}, the keys of a row")


def _check_cu_seqlens(values: list[int], T: int) -> None:
    expected = f"expected offsets that rise from 0 to T = {T}"
    if values[0] != 0:
        raise ValueError(
            f"{OP}: cu_seqlens starts at {values[0]}; {expected} - for lengths: F.pad(lengths.cumsum(0), (1, 0))"
        )
    for n, (before, offset) in enumerate(pairwise(values), 1):
        if offset < before:
            raise ValueError(f"{OP}: cu_seqlens[{n}] is {offset}, less than the {before} before it; {expected}")
    if values[-1] != T:
        raise ValueError(
            f"{OP}: cu_seqlens ends at {values[-1]}; {expected}, with the padding as a document of its own"
        )
