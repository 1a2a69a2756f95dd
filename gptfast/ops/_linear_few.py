"""A linear layer of few rows with the norm before it and the residual sum after it, in one kernel: decoding on a GPU.

M rows, K features, N outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.backend import has_kernel, kernels, resolve
from gptfast.ops._registry import register_fake
from gptfast.ops._tensors import autocast_dtype

OP = "linear_few"
ACTIVATIONS = (None, "gelu_tanh", "gelu", "relu_squared")
MOST_ROWS, MOST_VALUES = 8, 28 << 10  # M, and (M + 2 with a norm) K: csrc/cuda/linear_few.h


class RowNorm(NamedTuple):
    """The norm before the layer. kind: "layer_norm" or "rms_norm". weight, bias: (K,) or None for ones, zeros."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def few_backend(x: Tensor) -> str | None:
    """The backend that runs `linear_few` on the rows of x, (M, …); None where none does."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if not half or x.shape[0] > MOST_ROWS or autocast_dtype(x) is not None:
        return None
    runs_on = resolve("linear", None, x)
    return runs_on if runs_on != "eager" and has_kernel(OP, runs_on) else None


def takes_few(rows: int, features: int, normed: bool) -> bool:
    """Whether a layer of so many features, with a norm or without, has a kernel for so many rows."""
    return features % 8 == 0 and (rows + 2 * normed) * features <= MOST_VALUES


def linear_few(
    runs_on: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: RowNorm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    weights_ready: bool = False,
) -> Tensor:
    """activation(norm(x) weight^T + bias) + residual, without gradients.

    What the norm gives, and what is added to the residual, is rounded to x's dtype, as if each were an op of its own; sums are
    fp32. A row has the same bits whatever M is.

    Args:
        runs_on: what `few_backend` said.
        x: (M, K), bfloat16 or float16.
        weight: (N, K), of x's dtype, as all tensors here.
        bias: (N,) or None.
        norm: of the rows of x; None: none.
        activation: one of ACTIVATIONS; None: none.
        residual: (M, N) or None.
        weights_ready: the kernel before this one in the stream, which may still run, writes none of weight, bias and the norm's:
            they are asked for before it ends.
    Returns:
        (M, N) in x's dtype.
    Raises:
        RuntimeError: shapes or dtypes that the kernel does not take.
    """
    kind, scale, shift, eps = norm or ("", None, None, 0.0)
    return kernels(runs_on).linear_few(
        x, weight, bias, kind, scale, shift, eps, activation or "", residual, weights_ready
    )


@register_fake(OP)
def _(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
