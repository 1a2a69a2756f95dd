"""Low-rank updates of the rows of a linear layer, forward and backward: what `lora_linear` and `quantized_lora_linear` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.backend import BFLOAT16_ISAS, cpu_isa
from gptfast.ops._checks import check_float, check_number, check_probability, check_same_device
from gptfast.ops.dropout import dropout
from gptfast.ops.gemm import gemm, may_be_own

OP = "lora_linear"
FEW = 32  # the largest rank for which the gradients of factors have a kernel of their own (kMostFew in csrc/cpu/kernels.h)
NARROW = 16  # the largest for which x A^T and dy B do: at 16 it is 1.1 times as fast as `gemm`, at 32 as fast


class LowRank(NamedTuple):
    """One update of some rows.

    a, b: (r, K) and (N, r), any float dtype: rounded to x's, their gradients are in their own.
    scale: of the update.
    first, last: the rows of x, its leading dimensions flattened, that get it; -1: to the end.
    dropout_p, seed, offset: dropout of x before A, as in `gptfast.ops.dropout`; its rows are counted from `first`.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    first: int = 0
    last: int = -1
    dropout_p: float = 0.0
    seed: int = 0
    offset: int = 0


class Options(NamedTuple):
    """What the operators are given besides tensors: a list entry an update, two of `spans`."""

    scales: list[float]
    spans: list[int]
    rates: list[float]
    seeds: list[int]
    offsets: list[int]


def check_updates(x: Tensor, shape: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor], o: Options) -> None:
    """Check the updates of x (M, K) beside a weight of a shape (N, K).

    Raises:
        TypeError, ValueError: lists of different lengths, or a wrong dtype, device, shape or range.
    """
    counts = (len(a), len(b), len(o.scales), len(o.spans) / 2, len(o.rates), len(o.seeds), len(o.offsets))
    if len(set(counts)) > 1:
        raise ValueError(f"{OP}: lists of {counts} updates; expected as many everywhere, and two spans each")
    if x.dim() != 2 or len(shape) != 2:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)} and weight {tuple(shape)}; expected matrices")
    for n, (down, up) in enumerate(zip(a, b, strict=True)):
        check_factors(x, shape, down, up)
        check_number(OP, "scale", o.scales[n])
        if not abs(o.scales[n]) <= torch.finfo(torch.float32).max:  # also false for nan
            raise ValueError(f"{OP}: scale is {o.scales[n]}; expected a number that float32 holds")
        check_probability(OP, "dropout_p", o.rates[n])
        first, last = o.spans[2 * n : 2 * n + 2]
        if not 0 <= first <= last <= x.shape[0]:
            raise ValueError(
                f"{OP}: an update is for rows {first} to {last}; expected a range within x's {x.shape[0]} rows"
            )


def check_factors(x: Tensor, shape: Sequence[int], a: Tensor, b: Tensor) -> None:
    """Raise TypeError or ValueError for factors that do not fit x and a weight of a shape."""
    check_float(OP, a=a, b=b)
    check_same_device(OP, x=x, a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0], b.shape[1]) != (*reversed(shape), a.shape[0]):
        raise ValueError(
            f"{OP}: a has shape {tuple(a.shape)} and b {tuple(b.shape)} beside a weight of {tuple(shape)}; expected "
            "a (r, in_features) and b (out_features, r)"
        )


def options_of(x: Tensor, updates: list[LowRank]) -> Options:
    """What the operators are given of the updates of x (M, K)."""
    spans = [n for u in updates for n in (u.first, x.shape[0] if u.last == -1 else u.last)]
    scales, rates = [float(u.scale) for u in updates], [float(u.dropout_p) for u in updates]
    return Options(scales, spans, rates, [u.seed for u in updates], [u.offset for u in updates])


def add_updates(y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], o: Options) -> list[Tensor]:
    """y += the updates; returns what `update_gradients` needs of each."""
    low = empty_products(x, a, o.spans)
    for n, h in enumerate(low):
        first, last = o.spans[2 * n : 2 * n + 2]
        part = _thinned(x[first:last], o.rates[n], o.seeds[n], o.offsets[n])
        _narrow_product(part, a[n].t(), h, x.dtype)
        gemm(h.mul_(o.scales[n]), b[n].t(), y[first:last], dtype=x.dtype, accumulate=True)
    return low


def update_gradients(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    low: Sequence[Tensor],
    o: Options,
    want_factors: Sequence[bool],
) -> list[Tensor]:
    """Gradients of a, then of b; dx, if any, += that of the updates."""
    count = len(a)
    da, db = empty_gradients(a, b, want_factors)
    for n, h in enumerate(low):
        first, last = o.spans[2 * n : 2 * n + 2]
        rows, dropped = dy[first:last], (o.rates[n], o.seeds[n], o.offsets[n])
        if want_factors[count + n]:
            _transposed_product(h, rows, db[n].t(), x.dtype)
        if not (want_factors[n] or dx is not None):
            continue
        dh = _empty_low(x, last - first, a[n])
        _narrow_product(rows, b[n], dh, x.dtype)
        dh.mul_(o.scales[n])
        if want_factors[n]:
            _transposed_product(dh, _thinned(x[first:last], *dropped), da[n], x.dtype)
        if dx is not None and o.rates[n] > 0:
            through = torch.empty_like(x[first:last])
            gemm(dh, a[n], through, dtype=x.dtype)
            dx[first:last] += _thinned(through, *dropped)
        elif dx is not None:
            gemm(dh, a[n], dx[first:last], dtype=x.dtype, accumulate=True)
    return [*da, *db]


def _transposed_product(a: Tensor, b: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """out = a^T b for a (M, r): where there is a kernel that reads b once, without packing it, by that."""
    if a.shape[1] <= FEW and _reads_once(b, dtype):
        torch.ops.gptfast.gemm_few(a, b, out)
    else:
        gemm(a.t().contiguous(), b, out, dtype=dtype)


def _narrow_product(a: Tensor, b: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """out = a b for b (K, r): where there is a kernel that reads a once, with its columns in the lanes, by that."""
    if b.shape[1] <= NARROW and _reads_once(a, dtype):
        torch.ops.gptfast.gemm_narrow(a, b, out)
    else:
        gemm(a, b, out, dtype=dtype)


def _reads_once(large: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels for products of few columns take a matrix as it lies."""
    pairs = large.device.type == "cpu" and cpu_isa() in BFLOAT16_ISAS and large.dtype == dtype == torch.bfloat16
    return pairs and large.stride(1) == 1 and large.stride(0) >= large.shape[1] and may_be_own()


def _thinned(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    return x if p == 0 else dropout(x, p, seed % 2**64, offset)


def _empty_low(x: Tensor, rows: int, a: Tensor) -> Tensor:
    """(rows, r), which stays unrounded for half precision."""
    return x.new_empty(rows, a.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def empty_gradients(
    a: Sequence[Tensor], b: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """Room for the gradients; that of B is computed as its transpose (r, N)."""
    count = len(a)
    da = [f.new_empty(f.shape if want else (0, 0)) for f, want in zip(a, wanted[:count], strict=True)]
    db = [f.new_empty(f.shape[::-1] if want else (0, 0)).t() for f, want in zip(b, wanted[count:], strict=True)]
    return da, db


def empty_products(x: Tensor, a: Sequence[Tensor], spans: list[int]) -> list[Tensor]:
    """Room for x A^T of each update."""
    return [_empty_low(x, spans[2 * n + 1] - spans[2 * n], f) for n, f in enumerate(a)]
