"""Linear layer with an optional GELU: forward, input gradient and weight gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast._checks import check_choice
from gptfast.backend import is_many, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_floats, check_vector
from gptfast.ops._registry import define_python_op, differentiable, forbid_double_backward
from gptfast.ops._tensors import autocast, check_product_dtypes, rows_of
from gptfast.ops.gelu import gelu
from gptfast.ops.gemm import MIN_ROWS, column_sums, gemm, is_forced
from gptfast.ops.relu_squared import relu_squared

OP = "linear"
GELUS = {"gelu_tanh": "tanh", "gelu": "none"}  # fused with the bias
_HEAD = 4096  # more columns than layers have, so those of a vocabulary
ACTIVATIONS = (None, *GELUS, *reference.ACTIVATIONS)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """activation(x weight^T + bias), `F.linear` followed by the fused bias + GELU or by an activation of torch.

    On the CPU the three products (y = x W^T, dx = dy W, dW = dy^T x) run by the implementation that `gptfast.ops.gemm` chooses; sums
    are fp32, and so is the gradient of a float32 weight under autocast, which `F.linear` rounds to the autocast dtype, as
    do CPUs with AMX here. Elsewhere the products are torch's.

    Args:
        x: (..., in_features), any float dtype.
        weight: (out_features, in_features), of x's dtype, or of any under autocast; its gradient is laid out as it is, so
            the transpose of an (in_features, out_features) matrix costs no copy.
        bias: (out_features,) or None.
        activation: None, "gelu_tanh", "gelu", "relu", "relu_squared", "silu", "quick_gelu" (z sigmoid(1.702 z)) or "tanh".
        backend: see `gptfast.backend`.
    Returns:
        (..., out_features).
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or activation.
    """
    check_linear(x, weight, bias, activation)
    added = None if activation in GELUS else bias  # the op gelu adds the bias itself
    x = autocast(x)[0]
    runs_on = resolve(OP, backend, x)
    if _is_ragged_head(x, weight, added):
        y = _ragged_head(x, weight)
    elif by_our_kernels(runs_on, x):
        y = _fused("cpu", x, weight, added)
    else:
        y = F.linear(x, weight, added)
    return activated(y, bias, activation, backend)


def by_our_kernels(runs_on: str, x: Tensor) -> bool:
    """Whether a product with x is `gptfast.ops.gemm`'s, not `F.linear`'s."""
    if runs_on != "cpu":
        return False
    return torch.compiler.is_compiling() or x.numel() >= MIN_ROWS * x.shape[-1] or is_forced()


def activated(y: Tensor, bias: Tensor | None, activation: str | None, backend: str | None) -> Tensor:
    """activation(y), where y has the bias already, except for a GELU: the op adds it."""
    if activation in GELUS:
        return gelu(y, bias, GELUS[activation], backend=backend)
    if activation == "relu_squared":
        return relu_squared(y, backend=backend)
    return y if activation is None else reference.ACTIVATIONS[activation](y)


def _is_ragged_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether cuBLAS would read the result one by one, as of 50,257 columns; with autograd it is torch's product anyway."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled() or is_many(x):
        return False
    return bias is None and len(weight) % 8 != 0 and len(weight) > _HEAD and x.dtype in (torch.bfloat16, torch.float16)


def _ragged_head(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, in rows that begin at whole 128 bytes."""
    rows, N = rows_of(x), len(weight)
    y = x.new_empty(len(rows), -(-N // 64) * 64)[:, :N]
    gemm(rows, weight.t(), y, dtype=x.dtype)
    return y.view(*x.shape[:-1], N)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_floats(OP, x=x, weight=weight, bias=bias)
    check_choice(OP, "activation", activation, ACTIVATIONS)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected x (..., in_features) "
            "and weight (out_features, in_features)"
        )
    check_vector(OP, "bias", bias, weight.shape[0], "the output")
    check_product_dtypes(OP, x, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, call: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted, (x, weight) = ctx.needs_input_grad, ctx.saved_tensors
    dx, dweight, dbias = input_and_weight_gradients(rows_of(dy), rows_of(x), weight, *wanted)
    dbias = dbias.to(ctx.bias_dtype) if wanted[2] else None
    return dx.view(x.shape) if wanted[0] else None, dweight if wanted[1] else None, dbias


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = rows_of(x)
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    gemm(rows, weight.t(), y, dtype=x.dtype, bias=bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or weight.dim() != 2 or dy.shape != (len(x), len(weight)) or x.shape[1] != weight.shape[1]:
        got = f"dy has shape {tuple(dy.shape)}, x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        # torch.mm would resize the result
        raise ValueError(f"{OP}: {got}; expected dy (M, N), x (M, K), weight (N, K)")
    dx, dweight, dbias = _fake_backward(dy, x, weight, want_x, want_weight, want_bias)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    if want_x:
        gemm(dy, weight, dx, dtype=x.dtype)
    transposed = want_weight and dweight.stride(1) != 1
    if transposed:
        gemm(x.t(), dy, dweight.t(), dtype=x.dtype)
    elif want_weight:
        gemm(dy.t(), x, dweight, dtype=x.dtype, a_sums=dbias if want_bias else None)
    if want_bias and (transposed or not want_weight):
        column_sums(dy, dbias)
    return dx, dweight, dbias


def unrecorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product without the operator's 15 us of dispatch where the tensor is none of another class or batched."""
    return (torch.ops.gptfast.linear_fwd if type(x) is not Tensor or is_many(x) else _forward)(x, weight, bias)


def input_and_weight_gradients(dy: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_bwd` likewise; the operator where the call is traced or recorded too."""
    recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
    by_operator = recorded or type(dy) is not Tensor or is_many(dy)
    return (torch.ops.gptfast.linear_bwd if by_operator else _backward)(dy, *others)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if want_x else (0,)),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),  # laid out as the weight, which may be W.t()
        x.new_empty(weight.shape[0] if want_bias else 0, dtype=torch.float32),
    )


define_python_op("linear_fwd", _forward, _fake_forward)
define_python_op("linear_bwd", _backward, _fake_backward)
_fused = differentiable("linear_fwd", _save, _differentiate, eager=unrecorded)
forbid_double_backward(OP, "linear_bwd")
