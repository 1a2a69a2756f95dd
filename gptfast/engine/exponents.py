"""Powers of two that are taken off whole matrices, so that fp16 holds the scales of their groups of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast.engine.formats import BITS

GROUP = 32  # inputs that share a scale
# What the largest weight of a group may be. A scale is that divided by 8 to 127, and fp16 holds 2^-14 to 2^16 in full.
LEAST, MOST = 2.0**-6, 2.0**15
SMALLEST = -118  # as an exponent: scales of inputs of ordinary size, 2^-8 and more, times that are still fp32 in full
LARGEST = 128 - 15


def quantised(format: str) -> bool:
    """Whether groups of weights share a scale. "" is the format of vectors."""
    return BITS.get(format, 32.0) < 12


def exponent_of(name: str, weight: Tensor) -> int:
    """The exponent e for which fp16 holds the scales of weight / 2^e: 0 where it holds those of the weight itself, else what
    brings the largest value up to 2^15. Groups down to 2^-22 of that value then lose nothing.

    Args:
        name: of the weight, for messages.
        weight: (N, K), float32.
    Raises:
        ValueError: all values are too small.
    """
    rest = -weight.shape[1] % GROUP
    groups = (torch.nn.functional.pad(weight, (0, rest)) if rest else weight).unflatten(1, (-1, GROUP))
    most = torch.maximum(groups.amax(-1), -groups.amin(-1))  # seven times as fast as a norm
    largest = float(most.max())
    if largest == 0 or not math.isfinite(largest):  # what is not finite is refused where it is packed
        return 0
    if largest < MOST and float(most[most > 0].min()) >= LEAST:
        return 0
    exponent = math.frexp(largest)[1] - 15
    if exponent < SMALLEST:
        raise ValueError(
            f"compile_for_inference: the largest value of {name} is {largest:.3g}, too small for this format; use bfloat16 or "
            "float32"
        )
    return exponent


def are_exponents(value: Any) -> bool:
    """Whether that is a table of exponents as `exponent_of` gives them."""
    return isinstance(value, dict) and all(type(e) is int and SMALLEST <= e <= LARGEST for e in value.values())
