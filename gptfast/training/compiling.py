"""torch.compile in a run: its errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Around a step of a compiled network. Raises RuntimeError, with the compiler's first line, where it cannot be compiled."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RuntimeError(
            f"train: torch.compile cannot compile this network here ({lines[0] if lines else error}); leave `compile` out"
        ) from error
