"""MXFP4, the 4-bit weights of gpt-oss: to and from floats in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _mxfp4
from gptfast._nf4 import blocks_of, check_finite
from gptfast.ops._checks import FLOATS, check_dense, check_float, check_same_device


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in MXFP4, 4.25 bits a value, as OCP Microscaling Formats 1.0 has it and gpt-oss' files hold it.

    32 consecutive values of the last dimension share a power of two, 2^(floor(log2(largest magnitude)) - 2), and each becomes the
    nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives times it: halves to the even code, what is beyond 6 to 6. Numbers that
    come from MXFP4 keep their values. The last dimension is padded with zeros to whole blocks. In plain PyTorch, on any device.

    Args:
        weight: (..., K), float32, bfloat16, float16 or float64, finite.
    Returns:
        codes: (..., 16 G) uint8, G = ceil(K / 32): the first of a pair in the low half; `codes.unflatten(-1, (-1, 16))` are gpt-oss'
            blocks.
        scales: (..., G) uint8, 127 more than the exponent.
    Raises:
        TypeError, ValueError: wrong dtype or shape; a weight that is not finite.
    """
    op = "quantize_mxfp4"
    check_float(op, weight=weight)
    if weight.dim() == 0:
        raise ValueError(f"{op}: weight has shape (); expected (..., in_features)")
    check_finite(op, weight)
    return _mxfp4.quantize(blocks_of(weight.detach(), _mxfp4.BLOCK))


def dequantize_mxfp4(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The numbers that MXFP4 stands for: value of the code times the scale of its block. In plain PyTorch, on any device.

    Args:
        codes: (..., 16 G) uint8 of `quantize_mxfp4`, or (..., G, 16), as gpt-oss' files hold them.
        scales: (..., G) uint8; 255 stands for nan.
        dtype: of the result; bfloat16 and wider hold every value exactly.
    Returns:
        (..., 32 G); of a weight that was padded, the zeros at the end of each row too.
    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    op = "dequantize_mxfp4"
    for name, x in (("codes", codes), ("scales", scales)):
        if check_dense(op, name, x).dtype != torch.uint8:
            raise TypeError(f"{op}: {name} has dtype {x.dtype}; expected torch.uint8 (see quantize_mxfp4)")
    check_same_device(op, codes=codes, scales=scales)
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}; expected float32, bfloat16, float16 or float64")
    *rest, G = scales.shape if scales.dim() else (0,)
    if scales.dim() == 0 or codes.shape not in ((*rest, 16 * G), (*rest, G, 16)):
        raise ValueError(
            f"{op}: codes has shape {tuple(codes.shape)} beside scales {tuple(scales.shape)}; expected (..., 16 G) or (..., G, 16) "
            "beside (..., G)"
        )
    return _mxfp4.dequantize(codes.reshape(*rest, 16 * G), scales).to(dtype)
