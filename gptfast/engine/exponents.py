"""Powers of two by which matrices are divided, so that fp16 can represent the scales of their groups of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.engine.formats import BITS

GROUP = 32  # inputs that share a scale
# Range of the largest weight of a group. A scale is this divided by 8 to 127; fp16 has full precision from 2^-14 to 2^16.
LEAST, MOST = 2.0**-6, 2.0**15
SMALLEST = (
    -118
)  # smallest exponent: times the scales of ordinary inputs, 2^-8 and more, it is still a normal fp32 number
LARGEST = 128 - 15


def quantised(format: str) -> bool:
    """Whether groups of weights share a scale in fp16 in this format. "" is the format of vectors."""
    return BITS.get(format, 32.0) < 12 and format != "mxfp4"


def extremes(weight: Tensor) -> tuple[float, float]:
    """The largest magnitude of a matrix (N, K), nan or inf where it is not finite; and the least that is the largest of its
    group, groups of zeros apart (inf if there is none)."""
    rest = -weight.shape[1] % GROUP
    groups = (torch.nn.functional.pad(weight, (0, rest)) if rest else weight).unflatten(1, (-1, GROUP))
    most = torch.maximum(groups.amax(-1), -groups.amin(-1))  # seven times as fast as a norm
    return float(most.max()), float(most.where(most > 0, math.inf).min())


def exponent_of(name: str, largest: float, least: float) -> int:
    """The exponent e for which fp16 represents the scales of a matrix / 2^e.

    0 if it represents those of the matrix itself. Otherwise e brings the largest value to 2^15, and groups whose largest value
    is down to 2^-22 of that lose no precision.

    Args:
        name: name of the matrix, for error messages.
        largest, least: its `extremes`, finite.
    Raises:
        ValueError: all values are too small.
    """
    if largest == 0 or (largest < MOST and least >= LEAST):
        return 0
    exponent = math.frexp(largest)[1] - 15
    if exponent < SMALLEST:
        raise ValueError(
            f"compile_for_inference: the largest value of {name} is {largest:.3g}, too small for this format; use bfloat16 or "
            "float32"
        )
    return exponent


def are_exponents(value: Any) -> bool:
    """Whether `value` is a table of exponents that `exponent_of` can return."""
    return isinstance(value, dict) and all(type(e) is int and SMALLEST <= e <= LARGEST for e in value.values())
