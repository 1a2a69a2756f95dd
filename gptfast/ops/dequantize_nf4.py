"""NF4, the 4-bit weights of QLoRA: quantisation in PyTorch, dequantisation in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast._nf4 import (
    NESTED_BLOCK,
    blocks_of,
    check_finite,
    check_power_of_two,
    dynamic_values,
    nearest,
    nf4_absmax,
    nf4_values,
    pack_pairs,
)
from gptfast.backend import kernels, resolve
from gptfast.ops import reference
from gptfast.ops._checks import FLOATS, check_dense, check_float, check_same_device
from gptfast.ops._registry import register_fake

OP = "dequantize_nf4"
BLOCK_SIZES = (16, 4096)


class NF4(NamedTuple):
    """A weight in NF4; the positional arguments of `dequantize_nf4`."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def rows(self, out_features: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of the weight (out_features, in_features) for `quantized_linear(format="nf4")`;
        in_features must be a multiple of the block size."""
        scales = nf4_absmax(*self[1:])
        rows = max(out_features, 1)  # without outputs any number of rows will do
        if out_features < 0 or self.codes.numel() % rows or scales.numel() % rows:
            raise ValueError(
                f"NF4.rows: out_features is {out_features}, but there are {scales.numel()} blocks; expected whole blocks for "
                "each row - in_features must be a multiple of the block size"
            )
        return (
            self.codes.view(out_features, self.codes.numel() // rows),
            scales.view(out_features, scales.numel() // rows),
        )


def quantize_nf4(weight: Tensor, *, block_size: int = 64, double: bool = False) -> NF4:
    """A weight of any shape in 4 bits a value, in the layout of bitsandbytes (Dettmers et al., arXiv 2305.14314).

    Every run of `block_size` values of the flattened weight is divided by its largest magnitude, and each value becomes
    the nearest of 16 quantiles of a normal distribution: bitsandbytes' codes to the bit. By plain PyTorch on any device; a
    weight is quantised once. In a state_dict of bitsandbytes the results are `weight`, `weight.absmax`,
    `weight.nested_absmax`, and `nested_offset` in the JSON of `weight.quant_state.bitsandbytes__nf4`.

    Args:
        weight: float32, bfloat16, float16 or float64, finite.
        block_size: a power of two from 16 to 4096.
        double: quantise the scales too, in 8 bits around their mean with a scale for each 256: 4.13 bits a value
            instead of 4.5. Each gets the level that is nearest to it once it is dequantised.
    Returns:
        codes: (ceil(numel / 2),) uint8, the first of a pair in the high half.
        absmax: (blocks,) float32; with double (blocks,) uint8, and
        nested_absmax: (ceil(blocks / 256),) float32, offset: () float32; else None.
    Raises:
        TypeError, ValueError: wrong dtype, block size, or a weight that is not finite.
    """
    check_float("quantize_nf4", weight=weight)
    check_power_of_two("quantize_nf4", "block_size", block_size, *BLOCK_SIZES)
    check_finite("quantize_nf4", weight)
    flat = weight.detach().flatten()
    pieces = (
        flat.split(_PIECE) if flat.numel() else (flat,)
    )  # a multiple of every block size; bounds what is held beside
    packed, largest = zip(*(_codes(piece.float(), block_size) for piece in pieces), strict=True)
    codes, absmax = torch.cat(packed), torch.cat(largest)
    if not double:
        return NF4(codes, absmax)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    offset = torch.where(offset.isfinite(), offset, absmax.double().mean().float())  # where only the sum is too large
    blocks = blocks_of(absmax - offset, NESTED_BLOCK)
    nested_absmax = blocks.abs().amax(-1) if blocks.numel() else blocks.new_empty(0)
    return NF4(codes, _nearest_scales(absmax, blocks, nested_absmax, offset), nested_absmax, offset)


_PIECE = 2**20
_LEAST = 1e-38  # a block of smaller values is divided by this one


def _codes(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes of a vector, and the largest magnitude of each block; in the arithmetic of bitsandbytes, so that the codes
    are its codes to the bit: times 1 / largest in whole blocks, divided in a last one that is cut short."""
    blocks = blocks_of(x, block_size)
    if not blocks.numel():
        return x.new_empty(0, dtype=torch.uint8), x.new_empty(0)
    largest = blocks.abs().amax(-1)
    divisors = largest.clamp(min=_LEAST)
    scaled = blocks * (1 / divisors)[:, None]
    if x.numel() % block_size:
        scaled = torch.cat((scaled[:-1], blocks[-1:] / divisors[-1]))
        largest = torch.cat((largest[:-1], divisors[-1:]))
    codes = nearest(scaled.clamp(-1, 1), nf4_values(x.device)).flatten()
    return pack_pairs(codes[: x.numel() + x.numel() % 2]), largest  # a half byte that is left over holds the code of 0


def _nearest_scales(absmax: Tensor, blocks: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Code, (blocks,) uint8, of the value that lies nearest to each scale once it is dequantised, in float32 as it will be."""
    values = dynamic_values(absmax.device)
    scaled = torch.where(nested_absmax[:, None] > 0, blocks / nested_absmax[:, None], 0.0)
    first = nearest(scaled, values).flatten()[: absmax.numel()].int()
    candidates = torch.stack([(first + step).clamp(0, len(values) - 1) for step in (0, -1, 1)])
    back = torch.stack([nf4_absmax(codes, nested_absmax, offset) for codes in candidates])
    best = (back.double() - absmax.double()).abs().argmin(0)
    return candidates.gather(0, best[None])[0].to(torch.uint8)


def dequantize_nf4(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    shape: tuple[int, ...],
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The weight that `quantize_nf4`, or bitsandbytes, stored: NF4 value times the scale of its block, rounded once.

    A Triton kernel on GPUs; elsewhere plain PyTorch, which is correct but not fused.

    Args:
        codes: ceil(numel / 2) bytes of any shape, uint8, the first of a pair in the high half.
        absmax: (blocks,) float32, or uint8 where it is itself quantised; then
        nested_absmax: (ceil(blocks / 256),) float32 and offset: () float32, so that scale b of the weight is
            dynamic_value[absmax[b]] * nested_absmax[b // 256] + offset.
        shape: of the weight.
        block_size: a power of two from 16 to 4096.
        dtype: of the result.
        backend: see `gptfast.backend`; None follows the surrounding choice.
    Returns:
        Tensor of `shape`. No gradient flows to the codes: the weight is frozen.
    Raises:
        TypeError, ValueError: dtypes, sizes or devices that do not go together.
    """
    _check(codes, absmax, nested_absmax, offset, shape, block_size, dtype)
    runs_on = resolve(OP, backend, codes.new_empty(0, dtype=dtype))
    if runs_on == "eager":
        return reference.dequantize_nf4(
            codes, absmax, nested_absmax, offset, shape=shape, block_size=block_size, dtype=dtype
        )
    return kernels(runs_on).dequantize_nf4(codes, absmax, nested_absmax, offset, shape, block_size, dtype)


def _check(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype,
) -> None:
    check_power_of_two(OP, "block_size", block_size, *BLOCK_SIZES)
    if dtype not in FLOATS:
        raise TypeError(f"{OP}: dtype is {dtype}; expected float32, bfloat16, float16 or float64")
    if (nested_absmax is None) != (offset is None):
        raise ValueError(f"{OP}: nested_absmax and offset go together; got one of them")
    scales = {} if nested_absmax is None else {"nested_absmax": nested_absmax, "offset": offset}
    for name, x in {"codes": codes, "absmax": absmax, **scales}.items():
        check_dense(OP, name, x)
    check_same_device(OP, codes=codes, absmax=absmax, nested_absmax=nested_absmax, offset=offset)
    if not isinstance(shape, (tuple, list)) or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"{OP}: shape is {shape!r}; expected a tuple of sizes")
    blocks = -(-math.prod(shape) // block_size)
    scale_dtype = torch.float32 if nested_absmax is None else torch.uint8
    expected = {
        "codes": (codes, torch.uint8, (math.prod(shape) + 1) // 2),
        "absmax": (absmax, scale_dtype, blocks),
        "nested_absmax": (nested_absmax, torch.float32, -(-blocks // NESTED_BLOCK)),
        "offset": (offset, torch.float32, 1),
    }
    for name, (tensor, wanted, count) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != wanted:
            raise TypeError(f"{OP}: {name} has dtype {tensor.dtype}; expected {wanted} (see quantize_nf4)")
        if tensor.numel() != count:
            raise ValueError(
                f"{OP}: {name} has {tensor.numel()} values; expected {count} for shape {tuple(shape)} and "
                f"block_size {block_size}"
            )


@register_fake(OP)
def _(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)
