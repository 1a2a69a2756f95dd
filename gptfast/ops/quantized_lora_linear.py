"""Linear layer over a frozen weight of 8 or 4 bits with low-rank updates (QLoRA, Dettmers et al., arXiv 2305.14314).

The base's product is `quantized_linear`, and the updates are those of `lora_linear`: added to y and dx by products, without a
tensor of their size. What is saved is x, the codes and M x r an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.backend import resolve
from gptfast.ops._low_rank import LowRank, Options, add_updates, check_updates, options_of, update_gradients
from gptfast.ops._quantized_checks import OP, check_quantized, float_scales, scales_for
from gptfast.ops._tensors import autocast, rows_of
from gptfast.ops.linear import GELUS, activated
from gptfast.ops.quantized_linear import backward_product, forward_product, quantized_linear


def quantized_lora_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    updates: Sequence[LowRank] = (),
    *,
    format: str = "nf4",
    group_size: int = 64,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(x W^T + bias + updates) where codes and scales are W's; see `quantized_linear` and `lora_linear`.

    Args:
        x: (..., K).
        codes, scales, bias, format, group_size, nested_absmax, offset, backend: as in `quantized_linear`.
        activation, updates: as in `lora_linear`; without an update it is `quantized_linear`.
    Returns:
        (..., N) in x's dtype.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, format or group size.
    """
    added = None if activation in GELUS else bias  # the op gelu adds the bias itself
    if not updates:
        y = quantized_linear(
            x,
            codes,
            scales,
            added,
            format=format,
            group_size=group_size,
            nested_absmax=nested_absmax,
            offset=offset,
            backend=backend,
        )
        return y if activation is None else activated(y, bias, activation, backend)
    check_quantized(x, codes, scales, bias, format, group_size, nested_absmax, offset)
    x = autocast(x)[0]
    runs_on = resolve(OP, backend, x, float_scales(scales))
    scales, nested_absmax, offset = scales_for(runs_on, scales, nested_absmax, offset)
    rows = rows_of(x)
    options = options_of(rows, list(updates))
    factors = [u.a for u in updates] + [u.b for u in updates]
    check_updates(rows, (codes.shape[0], x.shape[-1]), factors[: len(updates)], factors[len(updates) :], options)
    how = (runs_on, format, group_size)
    y = QuantizedLoRAFunction.apply(how, options, rows, codes, scales, nested_absmax, offset, added, *factors)
    y = y.view(*x.shape[:-1], codes.shape[0])
    return activated(y, bias, activation, backend)


class QuantizedLoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[str, str, int],
        options: Options,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        runs_on, format, group_size = how
        y = forward_product(runs_on, x, codes, scales, bias, format, group_size, nested_absmax, offset)
        n = len(factors) // 2
        low = add_updates(y, x, factors[:n], factors[n:], options)
        ctx.save_for_backward(x, codes, scales, nested_absmax, offset, *factors, *low)
        ctx.how, ctx.options, ctx.count, ctx.in_features = how, options, n, x.shape[1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (runs_on, format, group_size), n, wanted = ctx.how, ctx.count, ctx.needs_input_grad
        x, codes, scales, nested_absmax, offset, *others = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = dbias = None
        if wanted[2]:
            weight = (codes, scales, format, group_size, ctx.in_features, nested_absmax, offset)
            dx = backward_product(runs_on, dy, *weight)
        if wanted[7]:
            dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        factors = others[:n], others[n : 2 * n], others[2 * n :]
        grads = update_gradients(dx, dy, x, *factors, ctx.options, list(wanted[8:]))
        return (
            *(None, None, dx, None, None, None, None, dbias),
            *(g if want else None for g, want in zip(grads, wanted[8:], strict=True)),
        )
