"""Linear layer with low-rank updates (LoRA, Hu et al., arXiv 2106.09685): y = x W^T + b + s dropout(x) A^T B^T, by rows.

M rows, K in_features, N out_features, r rank. The update is added to y, and its gradient to dx, by the products themselves:
no tensor of M x N or M x K is made for it, but where dropout thins x. What is saved beside x is M x r.

Floor of an update, forward and backward: 6 M r (K + N) flops beside 4 M K N of a frozen layer; and beside what that reads and
writes, x once and y twice (forward), dy twice, x once and dx twice (backward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.backend import resolve
from gptfast.ops._low_rank import (
    OP,
    LowRank,
    Options,
    add_updates,
    check_factors,
    check_updates,
    empty_gradients,
    empty_products,
    options_of,
    update_gradients,
)
from gptfast.ops._registry import caller, define_python_op, forbid_double_backward, register_derivative
from gptfast.ops._tensors import autocast, rows_of
from gptfast.ops.dropout import dropout
from gptfast.ops.gemm import MIN_ROWS, is_forced
from gptfast.ops.linear import GELUS, activated, check_linear


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
        check_factors(x, weight.shape, update.a, update.b)
    added = None if activation in GELUS else bias  # the op gelu adds the bias itself
    x = autocast(x)[0]
    run = _eager if resolve("linear", backend, x) == "eager" else _fused
    y = run(rows_of(x), weight, added, list(updates)).view(*x.shape[:-1], weight.shape[0])
    return activated(y, bias, activation, backend)


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
    if [h.shape for h in low] != [h.shape for h in empty_products(x, a, spans)]:
        raise ValueError(
            f"{OP}: low has shapes {[tuple(h.shape) for h in low]}; expected what the forward pass returned"
        )
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    base = torch.ops.gptfast.linear_bwd(dy, x, weight, want_x, want_weight, want_bias)
    options = Options(scales, spans, rates, seeds, offsets)
    return [*base, *update_gradients(base[0] if want_x else None, dy, x, a, b, low, options, want_factors)]


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
    return [x.new_empty(x.shape[0], weight.shape[0]), *empty_products(x, a, spans)]


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: list[Tensor], b: list[Tensor], *others: Any
) -> list[Tensor]:
    want_x, want_weight, want_bias, wanted = others[-4:]
    da, db = empty_gradients(a, b, wanted)
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
