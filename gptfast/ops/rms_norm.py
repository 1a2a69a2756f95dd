"""RMSNorm in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES, resolve
from gptfast.ops import reference
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import new_of_code
from gptfast.ops.layer_norm import check_norm, result_dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as `F.rms_norm` (Zhang and Sennrich, arXiv 1910.07467).

    Sums are fp32. The result is rounded once, after the weight, as `F.rms_norm`, gpt-oss and nanochat have it. The modules
    of Llama, Qwen and Mistral in transformers round x / sqrt(...) to x's dtype first: equal in float32; in 16 bits theirs
    differs by up to two units in the last place. The gradient of weight is summed in fp32 in a fixed order and rounded once.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        weight: (C,), any float dtype, or None for ones.
        eps: added to the mean square, >= 0. 1e-6 as in Llama; `F.rms_norm` takes the eps of the dtype.
        out_dtype: of the result, as in `layer_norm`; None: x's dtype.
        backend: see `gptfast.backend`.
    Returns:
        Tensor of x's shape, in out_dtype.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, eps or out_dtype.
    """
    op = "rms_norm"
    check_norm(op, x, eps, **weights_of(weight))
    y_dtype = result_dtype(op, out_dtype, x.dtype)
    runs_on = resolve(op, backend, x, weight)
    if runs_on == "eager":
        return reference.rms_norm(x, weight, float(eps), out_dtype=y_dtype)
    return _fused(runs_on, x, weight, float(eps), KERNEL_DTYPES.index(y_dtype))[0]


def weights_of(weight: Tensor | None) -> dict[str, Tensor | None]:
    """The vectors that `check_norm` checks: none, where there is no weight."""
    return {} if weight is None else {"weight": weight}


def new_rstd(x: Tensor) -> Tensor:
    """Uninitialised 1 / sqrt(mean(x^2) + eps) of each row, fp32."""
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def new_dweight(x: Tensor, weight: Tensor | None) -> Tensor:
    """An uninitialised gradient of the weight; empty where there is none."""
    return x.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, call: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = call("rms_norm_bwd", dy, x, weight, rstd)
    return dx, None if weight is None else dweight, None, None


@register_fake("rms_norm_fwd")
def _(x: Tensor, weight: Tensor | None, eps: float, y_type: int) -> tuple[Tensor, Tensor]:
    return new_of_code(x, x.shape, y_type), new_rstd(x)


@register_fake("rms_norm_bwd")
def _(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), new_dweight(x, weight)


_fused = differentiable("rms_norm_fwd", _save, _backward)
forbid_double_backward("rms_norm", "rms_norm_bwd")
