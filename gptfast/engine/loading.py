"""load: a `CompiledGPT` from a file that `CompiledGPT.save` wrote, after checks that the file fits what it says of itself."""

from __future__ import annotations

import os
from typing import Any

from gptfast.config import GPTConfig
from gptfast.engine import packed_file
from gptfast.engine.adapters import shape_of
from gptfast.engine.compiled import CompiledGPT
from gptfast.engine.exponents import quantised
from gptfast.metadata import Metadata


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    max_rows: int | None = None,
    cache_dtype: Any = None,
    verify: bool = False,
) -> CompiledGPT:
    """Open a model that `CompiledGPT.save` wrote. Its weights are mapped, and read when they are first used.

    Args:
        path: the file.
        threads, max_rows, cache_dtype: as in `GPT.compile_for_inference`.
        verify: compare the weights with their checksum first, which reads the whole file.
    Raises:
        OSError, ValueError: see `gptfast.engine.packed_file.PackedFile`.
    """
    source = packed_file.PackedFile(path)
    if verify and not source.intact():
        raise ValueError(f"{path} is damaged: its weights do not match their checksum; copy or compile it again")
    description = source.description
    try:
        config = GPTConfig(**description["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes a model that this gptfast cannot run ({error}); compile it again") from None
    options = {"threads": threads, "max_rows": max_rows, "cache_dtype": cache_dtype}
    _check_fit(path, config, description)
    dtype, formats, exponents = (description[key] for key in ("dtype", "formats", "exponents"))
    compiled = CompiledGPT(config, dtype, formats, source.weights, exponents, source=source, **options)
    compiled.metadata, compiled.base_mark = Metadata(**description["metadata"]), description["base"]
    return compiled


def _check_fit(path: str | os.PathLike[str], config: GPTConfig, description: dict[str, Any]) -> None:
    """Check that the model described by a header has the size that it states, before memory is allocated."""
    from gptfast import _C

    try:
        needed = _C.packed_bytes(shape_of(config), description["formats"])
    except ValueError as error:
        raise ValueError(f"{path} describes a model that does not fit its bytes: {error}; compile it again") from None
    if needed != description["bytes"]:
        raise ValueError(
            f"{path} describes a model that does not fit its bytes: it takes {needed} and {description['bytes']} are there; "
            "compile it again"
        )
    if not description["exponents"]:
        return
    stored = _C.weight_formats(shape_of(config), description["formats"])
    if unknown := [name for name in description["exponents"] if not quantised(stored.get(name, ""))]:
        raise ValueError(
            f"{path} has an exponent for {unknown[0]!r}, which is none of its quantised matrices; compile it again"
        )
