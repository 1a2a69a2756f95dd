"""MXFP4 as it lies in memory: 32 numbers of 4 bits (e2m1) share a scale of 8 bits (e8m0), by OCP Microscaling Formats 1.0."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # numbers that share a scale
BIAS, NAN = 127, 255  # of scales: a byte is 127 more than the exponent of two, or 255, which is no number
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits of a code; the fourth is the sign
LARGEST_EXPONENT = 2  # of a magnitude


def values(device: torch.device | str = "cpu") -> Tensor:
    """(16,) float32: the numbers of the codes."""
    return torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)], dtype=torch.float32, device=device)


def scale_values(scales: Tensor) -> Tensor:
    """float32 of uint8: 2^(scale - 127), of which the least is a subnormal number; nan for 255."""
    bits = scales.int() << 23
    bits = torch.where(scales == 0, 1 << 22, bits)
    return torch.where(scales == NAN, 0x7FC00000, bits).view(torch.float32)


def pack_pairs(codes: Tensor) -> Tensor:
    """(..., 2 n) codes below 16 -> (..., n) bytes: the first of a pair in the low half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_pairs(pairs: Tensor) -> Tensor:
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """(..., 16 G) codes and (..., G) scales, uint8 both, as (..., 32 G) float32."""
    numbers = values(codes.device)[unpack_pairs(codes).int()].unflatten(-1, (-1, BLOCK))
    return (numbers * scale_values(scales)[..., None]).flatten(-2)


def quantize(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(..., G, 32) finite floats -> codes (..., 16 G) and scales (..., G), uint8 both.

    The scale is two to the power of floor(log2(largest magnitude)) - 2, at least 2^-127 and at most 2^127; a number is divided by it
    and rounded to the nearest of the 16, halves to the even code, what is beyond 6 to 6. Signs of zeros are kept.
    """
    *rest, G, _ = blocks.shape
    pieces = [_quantize(piece) for piece in blocks.reshape(-1, BLOCK).split(_PIECE)]
    codes, scales = zip(*pieces, strict=True)
    return torch.cat(codes).view(*rest, G * BLOCK // 2), torch.cat(scales).view(*rest, G)


_PIECE = 2**15  # blocks; bounds what is held beside the weight


def _quantize(blocks: Tensor) -> tuple[Tensor, Tensor]:
    blocks = blocks if blocks.dtype == torch.float64 else blocks.float()
    largest = blocks.abs().amax(-1)
    exponents = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    exponents = torch.where(largest == 0, -BIAS, exponents).clamp(-BIAS, BIAS)
    scaled = torch.ldexp(blocks.abs(), -exponents[..., None])
    codes = torch.bucketize(scaled, _borders(scaled), out_int32=True).to(torch.uint8)
    codes = codes | blocks.signbit().to(torch.uint8) << 3
    return pack_pairs(codes), (exponents + BIAS).to(torch.uint8)


def _borders(like: Tensor) -> Tensor:
    """The largest number that is rounded to each magnitude but the last: a half between two codes goes to the even one."""
    levels = torch.tensor(MAGNITUDES, dtype=like.dtype, device=like.device)
    halves = (levels[1:] + levels[:-1]) / 2
    below = torch.nextafter(halves, torch.zeros_like(halves))
    return torch.where(torch.arange(len(halves), device=like.device) % 2 == 0, halves, below)
