"""Linear layer with low-rank updates (LoRA, Hu et al., arXiv 2106.09685): y = x W^T + b + s dropout(x) A^T B^T, by rows.

M rows, K in_features, N out_features, r rank. The update is added to y, and its gradient to dx, by the products themselves:
no tensor of M x N or M x K is made for it, but where dropout thins x. What is saved beside x is M x r.

Floor of an update, forward and backward: 6 M r (K + N) flops beside 4 M K N of a frozen layer; and beside what that reads and
writes, x once and y twice (forward), dy twice, x once and dx twice (backward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.backend import cpu_isa, resolve
from gptfast.ops._checks import check_float, check_number, check_probability, check_same_device
from gptfast.ops._registry import caller, define_python_op, forbid_double_backward, register_derivative
from gptfast.ops._tensors import autocast, rows_of
from gptfast.ops.dropout import dropout
from gptfast.ops.gemm import MIN_ROWS, gemm, is_forced, may_be_own
from gptfast.ops.linear import GELUS, activated, check_linear

OP = "lora_linear"
FEW = 32  # the largest rank for which the gradients of factors have a kernel of their own (kMostFew in csrc/cpu/kernels.h)


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


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    updates: Sequence[LowRank] = (),
    *,
    backend: str | None = None,
) -> Tensor:
    """activation(x weight^T + bias + updates), see `gptfast.ops.linear` for all but the last.

    Args:
        x: (..., K).
        weight, bias, activation, backend: as in `gptfast.ops.linear`; a frozen weight costs no gradient.
        updates: of rows, in turn; two may have the same rows.
    Returns:
        (..., N).
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or activation.
    """
    check_linear(x, weight, bias, activation)
    for update in updates:
        _check_factors(x, weight.shape, update.a, update.b)
    added = None if activation in GELUS else bias  # the op gelu adds the bias itself
    x = autocast(x)[0]
    if x.dtype != weight.dtype and autocast(weight)[0].dtype != x.dtype:
        raise TypeError(f"{OP}: x is {x.dtype} but weight is {weight.dtype}; cast one, or use torch.autocast")
    run = _eager if resolve("linear", backend, x) == "eager" else _fused
    y = run(rows_of(x), weight, added, list(updates)).view(*x.shape[:-1], weight.shape[0])
    return activated(y, bias, activation, backend)


class Options(NamedTuple):
    """What the operators are given besides tensors: a list entry an update, two of `spans`."""

    scales: list[float]
    spans: list[int]
    rates: list[float]
    seeds: list[int]
    offsets: list[int]


def check_updates(x: Tensor, shape: Sequence[int], a: Sequence[Tensor], b: Sequence[Tensor], o: Options) -> None:
    counts = (len(a), len(b), len(o.scales), len(o.spans) / 2, len(o.rates), len(o.seeds), len(o.offsets))
    if len(set(counts)) > 1:
        raise ValueError(f"{OP}: lists of {counts} updates; expected as many everywhere, and two spans each")
    if x.dim() != 2 or len(shape) != 2:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)} and weight {tuple(shape)}; expected matrices")
    for n, (down, up) in enumerate(zip(a, b, strict=True)):
        _check_factors(x, shape, down, up)
        check_number(OP, "scale", o.scales[n])
        if not abs(o.scales[n]) <= torch.finfo(torch.float32).max:  # also false for nan
            raise ValueError(f"{OP}: scale is {o.scales[n]}; expected a number that float32 holds")
        check_probability(OP, "dropout_p", o.rates[n])
        first, last = o.spans[2 * n : 2 * n + 2]
        if not 0 <= first <= last <= x.shape[0]:
            raise ValueError(
                f"{OP}: an update is for rows {first} to {last}; expected a range within x's {x.shape[0]} rows"
            )


def _check_factors(x: Tensor, shape: Sequence[int], a: Tensor, b: Tensor) -> None:
    check_float(OP, a=a, b=b)
    check_same_device(OP, x=x, a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0], b.shape[1]) != (*reversed(shape), a.shape[0]):
        raise ValueError(
            f"{OP}: a has shape {tuple(a.shape)} and b {tuple(b.shape)} beside a weight of {tuple(shape)}; expected "
            "a (r, in_features) and b (out_features, r)"
        )


def options_of(x: Tensor, updates: list[LowRank]) -> Options:
    spans = [n for u in updates for n in (u.first, x.shape[0] if u.last == -1 else u.last)]
    scales, rates = [float(u.scale) for u in updates], [float(u.dropout_p) for u in updates]
    return Options(scales, spans, rates, [u.seed for u in updates], [u.offset for u in updates])


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[LowRank]) -> Tensor:
    options = options_of(x, updates)
    check_updates(x, weight.shape, [u.a for u in updates], [u.b for u in updates], options)
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    for n, u in enumerate(updates):
        first, last = options.spans[2 * n : 2 * n + 2]
        part = (
            x[first:last]
            if u.dropout_p == 0
            else dropout(x[first:last], u.dropout_p, u.seed, u.offset, backend="eager")
        )
        update = F.linear(F.linear(part, u.a.to(x.dtype)), u.b.to(x.dtype)) * u.scale
        y = torch.cat((y[:first], y[first:last] + update, y[last:]))
    return y


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[LowRank]) -> Tensor:
    a, b, options = [u.a for u in updates], [u.b for u in updates], options_of(x, updates)
    if torch.compiler.is_compiling():
        return torch.ops.gptfast.lora_linear_fwd(x, weight, bias, a, b, *options)[0]
    return LoRAFunction.apply(len(updates), options, x, weight, bias, *a, *b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, weight, bias, a, b, *ctx.options = inputs
    ctx.save_for_backward(x, weight, *a, *b, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients_of_inputs(ctx: Any, call: Any, dy: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Of x, weight, bias and all factors. wanted: which of them."""
    n = (len(wanted) - 3) // 2
    x, weight, *others = ctx.saved_tensors
    a, b, low = others[:n], others[n : 2 * n], others[2 * n :]
    found = call("lora_linear_bwd", dy, x, weight, a, b, low, *ctx.options, *wanted[:3], list(wanted[3:]))
    grads = [g if want else None for g, want in zip(found, wanted, strict=True)]
    grads[2] = found[2].to(ctx.bias_dtype) if wanted[2] else None
    return grads


def _derivative(ctx: Any, call: Any, dy: Sequence[Tensor]) -> tuple[Any, ...]:
    x, weight, bias, a, b, *others = ctx.needs_input_grad
    grads = _gradients_of_inputs(ctx, call, dy[0], (x, weight, bias, *a, *b))
    return *grads[:3], grads[3 : 3 + len(a)], grads[3 + len(a) :], *(None for _ in others)


class LoRAFunction(torch.autograd.Function):
    """The operator with its lists of factors laid out flat, as autograd takes them."""

    @staticmethod
    def forward(ctx: Any, count: int, options: Options, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        inputs = (x, weight, others[0], others[1 : 1 + count], others[1 + count :], *options)
        output = _call("lora_linear_fwd", *inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return None, None, *_gradients_of_inputs(ctx, _call, dy, ctx.needs_input_grad[2:])


_call = caller("gptfast")


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    spans: list[int],
    rates: list[float],
    seeds: list[int],
    offsets: list[int],
) -> list[Tensor]:
    check_updates(x, weight.shape, a, b, Options(scales, spans, rates, seeds, offsets))
    if x.device.type == "cpu" and (x.shape[0] >= MIN_ROWS or is_forced()):
        y = torch.ops.gptfast.linear_fwd(x, weight, bias)
    else:  # as `gptfast.ops.linear` does: rows without an update have its bits
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return [y, *add_updates(y, x, a, b, Options(scales, spans, rates, seeds, offsets))]


def add_updates(y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], o: Options) -> list[Tensor]:
    """y += the updates; returns what `update_gradients` needs of each."""
    low = _low(x, a, o.spans)
    for n, h in enumerate(low):
        first, last = o.spans[2 * n : 2 * n + 2]
        part = _thinned(x[first:last], o.rates[n], o.seeds[n], o.offsets[n])
        gemm(part, a[n].t(), h, dtype=x.dtype)
        gemm(h.mul_(o.scales[n]), b[n].t(), y[first:last], dtype=x.dtype, accumulate=True)
    return low


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    low: list[Tensor],
    scales: list[float],
    spans: list[int],
    rates: list[float],
    seeds: list[int],
    offsets: list[int],
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    want_factors: list[bool],
) -> list[Tensor]:
    check_updates(x, weight.shape, a, b, Options(scales, spans, rates, seeds, offsets))
    if [h.shape for h in low] != [h.shape for h in _low(x, a, spans)]:
        raise ValueError(
            f"{OP}: low has shapes {[tuple(h.shape) for h in low]}; expected what the forward pass returned"
        )
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    base = torch.ops.gptfast.linear_bwd(dy, x, weight, want_x, want_weight, want_bias)
    options = Options(scales, spans, rates, seeds, offsets)
    return [*base, *update_gradients(base[0] if want_x else None, dy, x, a, b, low, options, want_factors)]


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
    da, db = _gradients(a, b, want_factors)
    for n, h in enumerate(low):
        first, last = o.spans[2 * n : 2 * n + 2]
        rows, dropped = dy[first:last], (o.rates[n], o.seeds[n], o.offsets[n])
        if want_factors[count + n]:
            _transposed_product(h, rows, db[n].t(), x.dtype)
        if not (want_factors[n] or dx is not None):
            continue
        dh = _empty_low(x, last - first, a[n])
        gemm(rows, b[n], dh, dtype=x.dtype)
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
    pairs = a.device.type == "cpu" and cpu_isa() == "avx512_bf16" and b.dtype == dtype == torch.bfloat16
    if pairs and a.shape[1] <= FEW and b.stride(0) >= b.shape[1] and may_be_own():
        torch.ops.gptfast.gemm_few(a, b, out)
    else:
        gemm(a.t().contiguous(), b, out, dtype=dtype)


def _thinned(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    return x if p == 0 else dropout(x, p, seed % 2**64, offset)


def _empty_low(x: Tensor, rows: int, a: Tensor) -> Tensor:
    """(rows, r), which stays unrounded for half precision."""
    return x.new_empty(rows, a.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _gradients(a: Sequence[Tensor], b: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """Room for the gradients; that of B is computed as its transpose (r, N)."""
    count = len(a)
    da = [f.new_empty(f.shape if want else (0, 0)) for f, want in zip(a, wanted[:count], strict=True)]
    db = [f.new_empty(f.shape[::-1] if want else (0, 0)).t() for f, want in zip(b, wanted[count:], strict=True)]
    return da, db


def _low(x: Tensor, a: Sequence[Tensor], spans: list[int]) -> list[Tensor]:
    return [_empty_low(x, spans[2 * n + 1] - spans[2 * n], f) for n, f in enumerate(a)]


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    spans: list[int],
    *others: Any,
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]), *_low(x, a, spans)]


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: list[Tensor], b: list[Tensor], *others: Any
) -> list[Tensor]:
    want_x, want_weight, want_bias, wanted = others[-4:]
    da, db = _gradients(a, b, wanted)
    return [
        x.new_empty(x.shape if want_x else (0,)),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
        x.new_empty(weight.shape[0] if want_bias else 0, dtype=torch.float32),
        *da,
        *db,
    ]


define_python_op("lora_linear_fwd", _forward, _fake_forward)
define_python_op("lora_linear_bwd", _backward, _fake_backward)
register_derivative("lora_linear_fwd", _save, _derivative)
forbid_double_backward(OP, "lora_linear_bwd")
