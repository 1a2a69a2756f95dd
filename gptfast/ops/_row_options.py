"""What a row of `sample_rows` is drawn with, as four int64 numbers: tensors of them go to a GPU in one copy."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from gptfast import rng
from gptfast.ops._checks import check_int, check_number

OP = "sample_rows"


class Parameters(NamedTuple):
    """Of a draw; see `sample`."""

    temperature: float
    top_k: int
    top_p: float
    seed: int


def row_options(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
) -> tuple[int, int, int, int]:
    """A row of `options` in `sample_rows`: temperature and top_p as the bits of a float64, the seed as the int64 of its bits.

    Args:
        temperature, top_k, top_p, seed: as in `sample`, with its errors.
    """
    check_parameters(OP, temperature, top_k, top_p, seed)
    temperature_bits, top_p_bits = struct.unpack("2q", struct.pack("2d", temperature, top_p))
    return temperature_bits, top_k, top_p_bits, rng.as_int64(seed)


def parameters_of(row: list[int]) -> Parameters:
    """The parameters that a row of `options` holds.

    Raises:
        ValueError: they are out of range.
    """
    temperature, top_p = struct.unpack("2d", struct.pack("2q", row[0], row[2]))
    found = Parameters(temperature, row[1], top_p, row[3] & (2**64 - 1))
    check_parameters(OP, *found)
    return found


def check_parameters(op: str, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    check_number(op, "temperature", temperature)
    check_number(op, "top_p", top_p)
    check_int(op, "top_k", top_k, 0, " (0 keeps all tokens)")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{op}: temperature is {temperature}; expected a finite number >= 0 (0 takes the most likely)")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p is {top_p}; expected 0 < top_p <= 1 (1 keeps all tokens)")
    rng.check_counter(op, "seed", seed, 64)
