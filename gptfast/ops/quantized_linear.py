"""Linear layer over a frozen weight of 8 or 4 bits a value: for decoding, and to train adapters around it (QLoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_choice
from gptfast._nf4 import blocks_of, check_finite, check_power_of_two, dequantize_groups, pack_pairs
from gptfast.backend import BFLOAT16_ISAS, cpu_isa, has_values, kernels, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float
from gptfast.ops._quantized_checks import GROUP_SIZES, OP, check_quantized, float_scales, scales_for
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import autocast, rows_of
from gptfast.ops.gemm import MIN_ROWS, gemm, implementation_for

DECODED = 1 << 21  # weights that are decoded for a library at a time, 4 MB


def quantize_groups(
    weight: Tensor, format: str = "int8", *, group_size: int = 32, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """A weight (out_features N, in_features K) in 8 or 4 bits: `group_size` consecutive values along K share a scale.

    int8: round(w / scale), scale = largest magnitude / 127. int4: the value of largest magnitude becomes -8, its sign
    that of the scale. K is padded with zeros to G whole groups. In plain PyTorch, on any device.

    Args:
        weight: float32, bfloat16, float16 or float64, finite.
        format: "int8" or "int4" (see `quantize_nf4` and `quantize_mxfp4` for the others).
        group_size: 32, 64 or 128.
        scale_dtype: float16 or float32.
    Returns:
        codes: (N, G * group_size) int8, or (N, G * group_size / 2) uint8 that hold value + 8, the first of a pair in the
            high half.
        scales: (N, G) scale_dtype.
    Raises:
        TypeError, ValueError: wrong dtype, shape, format, group size; a weight that is not finite, or too large
            for float16 scales.
    """
    op = "quantize_groups"
    check_float(op, weight=weight)
    check_choice(op, "format", format, ("int8", "int4"))
    check_power_of_two(op, "group_size", group_size, *GROUP_SIZES)
    check_choice(op, "scale_dtype", scale_dtype, (torch.float16, torch.float32))
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected (out_features, in_features)")
    check_finite(op, weight)
    groups = blocks_of(weight.detach().float(), group_size)  # N G group_size
    if groups.numel():
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]  # N G
    else:
        extreme = groups.new_empty(groups.shape[:2])
    scales = (extreme.abs() / 127 if format == "int8" else extreme / -8).to(scale_dtype)
    if has_values(scales) and not scales.isfinite().all():
        raise ValueError(f"{op}: a scale is beyond {scale_dtype}; use scale_dtype=torch.float32")
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())[..., None]
    lowest, highest = (-127, 127) if format == "int8" else (-8, 7)
    values = (groups * inverse).round().clamp(lowest, highest).flatten(1)
    return (values.to(torch.int8) if format == "int8" else pack_pairs((values + 8).to(torch.uint8))), scales


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
    backend: str | None = None,
) -> Tensor:
    """x W^T + bias where W[n, k] = scales[n, k // group_size] * value of code [n, k].

    The weight is read packed: once for a few rows of x, which bounds decoding, and for many in pieces of a few MB that are
    decoded as they are multiplied, by a library where `gptfast.ops.gemm` names one for bfloat16. The gradient dy W goes to x
    alone: the weight is frozen, and only its codes are kept for backward (Dettmers et al., arXiv 2305.14314). C++ on CPUs, CUDA
    or Triton on GPUs. Where the CPU has products of bfloat16, x of that dtype multiplies values that are rounded to it: up to
    8 rows those of 4-bit codes, before the float32 scale, else the weights; CUDA's kernels do so in both 16-bit dtypes, up to 32
    rows with values, else with weights. Sums are of float32, and so are all other products.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        codes, scales: of `quantize_groups`: G = ceil(K / group_size); of `NF4.rows`, K a multiple of the group size; or of
            `quantize_mxfp4`, scales uint8.
        bias: (N,) or None.
        format: "int8", "int4", "nf4" or "mxfp4".
        group_size: 32, 64 or 128; of NF4 its block size, of MXFP4 32.
        nested_absmax, offset: those of `quantize_nf4(double=True)` beside its absmax, (N, G) uint8, as scales. On the CPU each
            scale is decoded where it is used.
        backend: see `gptfast.backend`; None follows the surrounding choice.
    Returns:
        (..., N) in x's dtype, under autocast in the autocast dtype.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, format or group size.
    """
    check_quantized(x, codes, scales, bias, format, group_size, nested_absmax, offset)
    x = autocast(x)[0]
    runs_on = resolve(OP, backend, x, float_scales(scales))
    scales, nested_absmax, offset = scales_for(runs_on, scales, nested_absmax, offset)
    rows = x if x.dim() == 2 else rows_of(x)
    arguments = (rows, codes, scales, bias, format, group_size, nested_absmax, offset)
    in_python = runs_on == "eager" or multiplies_by_library(runs_on, x, codes)
    y = PythonFunction.apply(*arguments, runs_on) if in_python else _fused(runs_on, *arguments)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], codes.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, bias, format, group_size, nested_absmax, offset = inputs
    ctx.save_for_backward(codes, scales, nested_absmax, offset)
    ctx.weight = format, group_size, x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, call: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        codes, scales, *nested = ctx.saved_tensors
        dx = call("quantized_linear_bwd", dy, codes, scales, *ctx.weight, *nested)
    if ctx.needs_input_grad[3]:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    return dx, None, None, dbias, None, None, None, None


class PythonFunction(torch.autograd.Function):
    """The products that Python puts together. It keeps the codes alone for backward, where autograd would keep the dequantised
    weight."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, ctx.runs_on = arguments
        y = forward_product(ctx.runs_on, *inputs)
        _save(ctx, tuple(inputs), y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, lambda name, *arguments: backward_product(ctx.runs_on, *arguments), dy), None


def multiplies_by_library(runs_on: str, x: Tensor, codes: Tensor) -> bool:
    """Whether a library multiplies rows of x by stretches of the weight that are decoded for it: where bfloat16 is multiplied so
    (see `gptfast.ops.gemm`), as on CPUs with AMX. Its product is then twice as fast as that of our kernels."""
    if runs_on != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    many = x.numel() >= MIN_ROWS * x.shape[-1] > 0
    return many and cpu_isa() in BFLOAT16_ISAS and implementation_for(rows_of(x), codes.t(), x.dtype) != "own"


def forward_product(
    runs_on: str,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """y of a backend or "eager"."""
    if runs_on == "eager":
        return reference.quantized_linear(x, codes, scales, bias, format=format, group_size=group_size)
    own = kernels(runs_on)
    if not multiplies_by_library(runs_on, x, codes):
        return own.quantized_linear_fwd(x, codes, scales, bias, format, group_size, nested_absmax, offset)
    scales = scales_for("a library", scales, nested_absmax, offset)[0]
    (M, K), N = x.shape, codes.shape[0]
    y = x.new_empty(M, N)
    for first, last in _stretches(N, K, 1):
        part = own.quantized_decode(codes[first:last], scales[first:last], format, group_size, K, 0, K)
        added = None if bias is None else bias[first:last]
        gemm(x, part.t(), y[:, first:last], dtype=x.dtype, bias=added)
    return y


def backward_product(
    runs_on: str,
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    group_size: int,
    in_features: int,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """dx of a backend or "eager"."""
    if runs_on == "eager":
        weight = dequantize_groups(codes, scales, format, group_size)[:, :in_features]
        wide = torch.promote_types(dy.dtype, torch.float32)
        return (dy.to(wide) @ weight.to(wide)).to(dy.dtype)
    own = kernels(runs_on)
    if not multiplies_by_library(runs_on, dy, codes):
        return own.quantized_linear_bwd(dy, codes, scales, format, group_size, in_features, nested_absmax, offset)
    scales = scales_for("a library", scales, nested_absmax, offset)[0]
    dx = dy.new_empty(dy.shape[0], in_features)
    for first, last in _stretches(in_features, codes.shape[0], group_size):
        part = own.quantized_decode(codes, scales, format, group_size, in_features, first, last)
        gemm(dy, part, dx[:, first:last], dtype=dy.dtype)
    return dx


def _stretches(n: int, each: int, unit: int) -> Iterator[tuple[int, int]]:
    """[0, n) in about equal parts of whole units, of at most DECODED values where one of n has `each`."""
    count = max(1, -(-n * each // DECODED))
    step = -(-n // (count * unit)) * unit
    for first in range(0, n, step):
        yield first, min(first + step, n)


@register_fake("quantized_linear_fwd")
def _(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@register_fake("quantized_linear_bwd")
def _(
    dy: Tensor, codes: Tensor, scales: Tensor, format: str, group_size: int, in_features: int, *nested: Any
) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


@register_fake("quantized_decode")
def _(codes: Tensor, scales: Tensor, format: str, group_size: int, in_features: int, first: int, last: int) -> Tensor:
    return codes.new_empty(codes.shape[0], last - first, dtype=torch.bfloat16)


_fused = differentiable("quantized_linear_fwd", _save, _backward)
forbid_double_backward(OP, "quantized_linear_bwd")
