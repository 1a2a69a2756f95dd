"""Quantised weights as they lie in memory: tables of values, two codes to a byte, quantisation to the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import _mxfp4
from gptfast.backend import has_values

# NormalFloat, 4 bits (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution, with 0.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NESTED_BLOCK = 256  # scales that share a scale of their own under double quantisation


def nf4_values(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def _dynamic() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist() + (-middles).tolist()
    return tuple(sorted(values))


# 256 values of 8 bits, of which a leading run of zeros is a decimal exponent and the rest a fraction (Dettmers, arXiv
# 1511.04561): in these bitsandbytes stores doubly quantised scales.
DYNAMIC_VALUES = _dynamic()


def dynamic_values(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(DYNAMIC_VALUES, dtype=torch.float32, device=device)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index, uint8, of the value of an ascending table that lies nearest to each x."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)


def pack_pairs(codes: Tensor) -> Tensor:
    """(..., n) codes below 16 -> (..., ceil(n / 2)) bytes: the first of a pair in the high half."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack_pairs(pairs: Tensor) -> Tensor:
    return torch.stack([pairs >> 4, pairs & 15], -1).flatten(-2)


def blocks_of(x: Tensor, size: int) -> Tensor:
    """(..., n) -> (..., ceil(n / size), size), the end filled up with zeros."""
    n = x.shape[-1]
    count = -(-n // size)
    return torch.nn.functional.pad(x, (0, count * size - n)).unflatten(-1, (count, size))


def nf4_absmax(absmax: Tensor, nested_absmax: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """(blocks,) scales of NF4, dequantised if they are doubly quantised."""
    if nested_absmax is None or offset is None:
        return absmax.flatten()
    nested = nested_absmax.flatten().repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    # by a call that takes a quarter of the time of an index on CPUs: layers ask in each forward
    return dynamic_values(absmax.device).index_select(0, absmax.flatten().int()) * nested + offset


def dequantize_groups(codes: Tensor, scales: Tensor, format: str, group_size: int) -> Tensor:
    """(N, G * group_size): each value of a code times the scale of its group."""
    if format == "mxfp4":
        return _mxfp4.dequantize(codes, scales)
    if format == "int8":
        values = codes.float()
    elif format == "int4":
        values = unpack_pairs(codes).float() - 8
    else:
        values = nf4_values(codes.device)[unpack_pairs(codes).long()]
    return (
        values.unflatten(1, (-1, group_size)) * scales.to(torch.promote_types(scales.dtype, torch.float32))[..., None]
    ).flatten(1)


def check_finite(op: str, weight: Tensor) -> None:
    if has_values(weight) and not weight.isfinite().all():
        raise ValueError(f"{op}: weight holds inf or nan, which no code stands for; look where the weight comes from")


def check_power_of_two(op: str, name: str, size: int, least: int, most: int) -> None:
    if not isinstance(size, int) or size & (size - 1) or not least <= size <= most:
        raise ValueError(f"{op}: {name} is {size!r}; expected a power of two from {least} to {most}")
