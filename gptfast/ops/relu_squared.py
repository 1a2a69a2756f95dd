"""Squared ReLU."""

from __future__ import annotations

from torch import Tensor

from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float


def relu_squared(x: Tensor, *, backend: str | None = None) -> Tensor:
    """max(x, 0)^2, as `F.relu(x).square()` but in one pass (So et al., Primer, arXiv 2109.08668; nanochat's activation).

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        backend: see `gptfast.backend`.
    Returns:
        Tensor of x's shape and dtype, squared in fp32 and rounded once. Its gradient is 2 max(x, 0) times the incoming one.
    Raises:
        TypeError: wrong dtype.
    """
    check_float("relu_squared", x=x)
    resolve("relu_squared", backend, x)
    return reference.relu_squared(x)
