"""Packing a GPT for the engine: its values into one block of memory, in a format."""

from __future__ import annotations

import contextlib
import mmap
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

from gptfast.engine.adapters import packed_adapters, shape_of
from gptfast.engine.compiled import CompiledGPT
from gptfast.engine.exponents import exponent_of, quantised
from gptfast.engine.formats import format_name, matrix_formats
from gptfast.engine.runner import PANEL
from gptfast.metadata import metadata_of
from gptfast.nn.difference import check_values, difference, true_config

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.transformer import Transformer


def compile_model(
    model: Transformer,
    dtype: Any = "bfloat16",
    *,
    threads: int | None = None,
    max_rows: int | None = None,
    cache_dtype: Any = None,
) -> CompiledGPT:
    """Pack a GPT for the engine; see `GPT.compile_for_inference`."""
    try:
        from gptfast import _C
    except ImportError as error:
        raise RuntimeError(
            f"compile_for_inference: gptfast was installed without its compiled part ({error}); install it with a C++ "
            "compiler, or use GPT.generate"
        ) from None
    name = format_name(dtype)
    config = _config_of(model)
    formats, shape = matrix_formats(name), shape_of(config)
    adapters = packed_adapters(model, shape)
    values, stored = _values(model), _C.weight_formats(shape, formats)
    exponents = {key: exponent_of(key, _fp32(values[key])) for key, kind in stored.items() if quantised(kind)}
    exponents = {key: exponent for key, exponent in exponents.items() if exponent}
    # zeroed, aligned to a page, and given back to the system at once when it is freed
    weights = mmap.mmap(-1, _C.packed_bytes(shape, formats), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _ask_for_large_pages(weights)
    compiled = CompiledGPT(
        config, name, formats, weights, exponents, threads=threads, max_rows=max_rows, cache_dtype=cache_dtype
    )
    compiled.metadata, compiled._adapters = deepcopy(metadata_of(model)), adapters
    _pack(values, compiled._core)
    return compiled


def _config_of(model: Transformer) -> GPTConfig:
    """The true config of the model. Raises ValueError if its modules are not what its config says."""
    check_values("compile_for_inference", model)
    told = difference(model, adapters=True)
    if told is not None:
        raise ValueError(
            f"compile_for_inference: {told}; the engine computes what the config says - undo or merge the change, set "
            "model.config accordingly, or use GPT.generate, which runs the modules as they stand"
        )
    return true_config(model)


def _ask_for_large_pages(memory: mmap.mmap) -> None:
    """Ask for large pages: with fewer TLB misses one core reads a third faster. A refusal is harmless."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)


def _values(model: Transformer) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _fp32(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32)


def _pack(values: dict[str, Tensor], core: Any) -> None:
    """Pack one weight after another, from fp32; only one fp32 copy exists at a time."""
    for name in core.weight_names():
        value = _fp32(values[name])
        if name == "wpe.weight":  # rows are padded to whole panels
            value = torch.nn.functional.pad(value, (0, -value.shape[1] % PANEL)).flatten()
        value = value.contiguous()
        if not value.isfinite().all():
            raise ValueError(f"compile_for_inference: {name} holds nan or infinities; the model is damaged")
        core.pack(name, to_dlpack(value))
