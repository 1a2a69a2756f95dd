"""Checks of the arguments of causal_attention; lengths on a GPU are read once for each tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from gptfast._schemas import AttentionOptions
from gptfast.ops._checks import check_int, check_number, check_probability

OP = "causal_attention"
# Attributes of lengths on a GPU: the version, limit and check that they passed; whether `trusted` marked them.
_FOUND_RIGHT, _TRUSTED = "_gptfast_found_right", "_gptfast_trusted"


def check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Dtypes and shapes; all are on one device."""
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{OP}: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal")
    of_q, of_k = q.shape, k.shape
    if len(of_q) != 4:
        raise ValueError(f"{OP}: q has shape {tuple(of_q)}; expected (B, H, T, D)")
    if of_k != v.shape or len(of_k) != 4:
        raise ValueError(f"{OP}: k has shape {tuple(of_k)} and v {tuple(v.shape)}; expected equal (B, H, S, D)")
    (B, H, _, D), (batch, _, _, depth) = of_q, of_k
    if batch != B:
        raise ValueError(f"{OP}: k has batch {batch} but q has {B}; they must be equal")
    if depth != D:
        raise ValueError(f"{OP}: k has head_dim {depth} but q has {D}; they must be equal - check the c_attn split")
    if not 1 <= D <= 256:
        raise ValueError(f"{OP}: head_dim is {D}; expected 1 to 256 - use more heads")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(
            f"{OP}: sinks has shape {tuple(sinks.shape)}; expected ({H},), one logit a head of q "
            "- a mask is no argument of this op: seq_lens, left_pad, cu_seqlens or window say who sees whom"
        )


def check_heads(H: int, key_heads: int, enable_gqa: bool) -> None:
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


def check_numbers(dropout_p: float, window: int | None, softmax_scale: float | None, softcap: float | None) -> None:
    check_probability(OP, "dropout_p", dropout_p)
    if window is not None:
        check_int(OP, "window", window, 1)
    if softmax_scale is not None:
        check_number(OP, "softmax_scale", softmax_scale)
    if softcap is not None:
        check_number(OP, "softcap", softcap)
        if not 0 <= softcap < math.inf:  # also false for nan
            raise ValueError(f"{OP}: softcap is {softcap}; expected a finite number above 0, or None for no cap")


def check_options(q: Tensor, k: Tensor, options: AttentionOptions) -> None:
    """Check the options that depend on the tensors or on each other."""
    if not math.isfinite(options.scale):
        raise ValueError(f"{OP}: softmax_scale is {options.scale}; expected a finite number")
    if options.window and not options.causal:
        raise ValueError(f"{OP}: window is {options.window} with causal={options.causal}; a window needs causal=True")
    if options.seq_lens is not None or options.cu_seqlens is not None or options.left_pad is not None:
        _check_lengths(q, k, options)


def _check_lengths(q: Tensor, k: Tensor, options: AttentionOptions) -> None:
    rows = {"seq_lens": options.seq_lens, "left_pad": options.left_pad}
    cu_seqlens = options.cu_seqlens
    for name, lengths in (*rows.items(), ("cu_seqlens", cu_seqlens)):
        if lengths is not None and (lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64)):
            raise TypeError(
                f"{OP}: {name} has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; "
                "expected a vector of int32 or int64"
            )
    if cu_seqlens is not None and cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{OP}: cu_seqlens is empty; expected offsets from 0 to T = {q.shape[2]}, one more than documents"
        )
    for name, lengths in rows.items():
        if lengths is not None and lengths.shape[0] != q.shape[0]:
            raise ValueError(
                f"{OP}: {name} has {lengths.shape[0]} entries for a batch of {q.shape[0]}; expected one per row"
            )
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[2] != k.shape[2]):
        raise ValueError(
            f"{OP}: cu_seqlens needs packed documents, B = 1 and T = S; "
            f"got B = {q.shape[0]}, T = {q.shape[2]}, S = {k.shape[2]}"
        )
    if options.seq_lens is not None:
        _check_values(options.seq_lens, k.shape[2], _check_seq_lens)
    if options.left_pad is not None:
        _check_values(options.left_pad, k.shape[2], _check_left_pad)
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
    _check_range("seq_lens", values, S)


def _check_left_pad(values: list[int], S: int) -> None:
    _check_range("left_pad", values, S)


def _check_range(name: str, values: list[int], S: int) -> None:
    for n, value in enumerate(values):
        if not 0 <= value <= S:
            raise ValueError(f"{OP}: {name}[{n}] is {value}; expected 0 to S = {S}, the keys of a row")


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
