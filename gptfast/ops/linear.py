"""Linear layer with an optional GELU; the product runs in the GEMM library behind torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gptfast.ops._common import check_choice, check_float, check_same_device, check_vector
from gptfast.ops.gelu import gelu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x weight^T + bias), `F.linear` followed by the fused bias + GELU where one is asked for.

    Args:
        x: (..., in_features), any float dtype.
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        activation: None, "gelu_tanh" or "gelu".
    Returns:
        (..., out_features).
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or activation.
    """
    check_float("linear", x=x, weight=weight, bias=bias)
    check_same_device("linear", x=x, weight=weight, bias=bias)
    check_choice("linear", "activation", activation, (None, "gelu_tanh", "gelu"))
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected x (..., in_features) "
            "and weight (out_features, in_features)"
        )
    check_vector("linear", "bias", bias, weight.shape[0], "the output")
    if activation is None:
        return F.linear(x, weight, bias)
    return gelu(F.linear(x, weight), bias, "tanh" if activation == "gelu_tanh" else "none")
