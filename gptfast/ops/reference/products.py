"""Matrix products in eager PyTorch, of plain and of quantised weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast._nf4 import dequantize_groups, nf4_absmax, nf4_values, unpack_pairs
from gptfast.ops.reference._numbers import upcast
from gptfast.ops.reference.rows import ACTIVATIONS, gelu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation is None or activation in ACTIVATIONS:
        return y if activation is None else ACTIVATIONS[activation](y)
    return gelu(y, None, "tanh" if activation == "gelu_tanh" else "none")


def dequantize_nf4(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    shape: tuple[int, ...],
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    n = math.prod(shape)
    values = nf4_values(codes.device)[unpack_pairs(codes.flatten())[:n].long()]
    scales = nf4_absmax(absmax, nested_absmax, offset).repeat_interleave(block_size)[:n]
    return (values * scales).to(dtype).view(shape)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    format: str = "int8",
    group_size: int = 32,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    if nested_absmax is not None:
        scales = nf4_absmax(scales, nested_absmax, offset).view(scales.shape)
    xf = upcast(x)
    weight = dequantize_groups(codes, scales, format, group_size)[:, : x.shape[-1]].to(xf.dtype)  # N K
    y = F.linear(xf, weight)
    return (y if bias is None else y + bias.to(xf.dtype)).to(x.dtype)
