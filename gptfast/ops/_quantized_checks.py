"""Checks of a call of `quantized_linear`, and the scales that a backend takes."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast._checks import check_choice
from gptfast._mxfp4 import BLOCK as MXFP4_BLOCK
from gptfast._nf4 import NESTED_BLOCK, check_power_of_two, nf4_absmax
from gptfast.ops._checks import FLOATS, check_dense, check_float, check_same_device, check_vector

OP = "quantized_linear"
FORMATS = ("int8", "int4", "nf4", "mxfp4")
GROUP_SIZES = (32, 128)


def scales_for(
    runs_on: str, scales: Tensor, nested_absmax: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales, nested_absmax and offset for a backend: the CPU's kernels alone take doubly quantised ones."""
    if nested_absmax is None or offset is None or runs_on == "cpu":
        return scales, nested_absmax, offset
    return nf4_absmax(scales, nested_absmax, offset).view(scales.shape), None, None


def float_scales(scales: Tensor) -> Tensor | None:
    """The scales, if they are numbers of a dtype that a backend may not take, and no bytes."""
    return None if scales.dtype == torch.uint8 else scales


def check_quantized(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    if _fits(x, codes, scales, bias, format, group_size, nested_absmax, offset):
        return
    check_choice(OP, "format", format, FORMATS)
    check_float(OP, x=x, bias=bias)
    _check_scales(scales, format, group_size, nested_absmax, offset)
    check_dense(OP, "codes", codes)
    check_same_device(OP, x=x, codes=codes, scales=scales, bias=bias, nested_absmax=nested_absmax, offset=offset)
    code_dtype, per_byte = (torch.int8, 1) if format == "int8" else (torch.uint8, 2)
    if codes.dtype != code_dtype:
        raise TypeError(f"{OP}: codes has dtype {codes.dtype}; format={format!r} has {code_dtype}")
    if x.dim() == 0 or codes.dim() != 2:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)}, codes {tuple(codes.shape)}; expected x (..., K) and (N, …)"
        )
    K, N = x.shape[-1], codes.shape[0]
    if format == "nf4" and K % group_size:
        raise ValueError(
            f"{OP}: x has {K} features; format='nf4' takes whole blocks of {group_size}, as blocks of others run across "
            "rows - use dequantize_nf4 and linear"
        )
    groups = -(-K // group_size)
    expected = {"codes": (codes, (N, groups * group_size // per_byte)), "scales": (scales, (N, groups))}
    if nested_absmax is not None and offset is not None:
        blocks = -(-N * groups // NESTED_BLOCK)
        expected |= {"nested_absmax": (nested_absmax, (blocks,)), "offset": (offset, ())}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{OP}: {name} has shape {tuple(tensor.shape)}; expected {shape} for {K} features in groups of "
                f"{group_size} in {format} - was the weight quantised with another format or group_size?"
            )
    check_vector(OP, "bias", bias, N, "the output")


def _check_scales(
    scales: Tensor, format: str, group_size: int, nested_absmax: Tensor | None, offset: Tensor | None
) -> None:
    nested = {"nested_absmax": nested_absmax, "offset": offset}
    given = [name for name, x in nested.items() if x is not None]
    if given and (format != "nf4" or len(given) == 1):
        raise ValueError(
            f"{OP}: {' and '.join(given)} with format={format!r}; nested_absmax and offset go together, with format='nf4'"
        )
    for name in given:
        dtype = check_dense(OP, name, nested[name]).dtype
        if dtype != torch.float32:
            raise TypeError(f"{OP}: {name} has dtype {dtype}; expected torch.float32 (see quantize_nf4)")
    if format == "mxfp4" or given:
        dtype, of = check_dense(OP, "scales", scales).dtype, " with nested_absmax" if given else ""
        if dtype != torch.uint8:
            raise TypeError(
                f"{OP}: scales has dtype {dtype}; format={format!r}{of} has torch.uint8, see quantize_{format}"
            )
    else:
        check_float(OP, scales=scales)
    if format != "mxfp4":
        check_power_of_two(OP, "group_size", group_size, *GROUP_SIZES)
    elif group_size != MXFP4_BLOCK:
        raise ValueError(f"{OP}: group_size is {group_size!r}; format='mxfp4' has blocks of {MXFP4_BLOCK}")


def _fits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
) -> bool:
    """Whether a call with NF4 on the CPU is plainly in order: the checks that name what is wrong take as long as the operator's
    call, a twentieth of the time of a row's product."""
    if format != "nf4" or group_size not in (32, 64, 128) or (nested_absmax is None) != (offset is None):
        return False
    double = nested_absmax is not None and offset is not None
    for t in (x, codes, scales, nested_absmax, offset) if double else (x, codes, scales):
        if type(t) is not Tensor or not t.is_cpu or t.layout is not torch.strided:
            return False
    width, shape = x.shape, codes.shape
    if len(shape) != 2 or not width or width[-1] != 2 * shape[1] or width[-1] % group_size:
        return False
    N, G = shape[0], width[-1] // group_size
    if scales.shape != (N, G) or codes.dtype is not torch.uint8 or x.dtype not in FLOATS:
        return False
    if bias is not None and not (
        isinstance(bias, Tensor)
        and bias.is_cpu
        and bias.layout is torch.strided
        and bias.dtype in FLOATS
        and bias.shape == (N,)
    ):
        return False
    if nested_absmax is None or offset is None:
        return scales.dtype in FLOATS
    fits = nested_absmax.shape == (-(-N * G // NESTED_BLOCK),) and offset.dim() == 0
    return fits and scales.dtype is torch.uint8 and nested_absmax.dtype is offset.dtype is torch.float32
