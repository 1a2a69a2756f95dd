"""The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a permutation of 64-bit integers that mixes their bits."""

from __future__ import annotations

import numpy as np

GAMMA = 0x9E3779B97F4A7C15  # added before the finaliser, so that 0 is not a fixed point
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def finalised(x: np.ndarray) -> np.ndarray:
    """Of each element of an array of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def mixed(x: int) -> int:
    """Of one integer plus GAMMA."""
    x = (x + GAMMA) & _MASK
    x = (x ^ (x >> 30)) * _FIRST & _MASK
    x = (x ^ (x >> 27)) * _SECOND & _MASK
    return x ^ (x >> 31)
