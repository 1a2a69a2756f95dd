"""Packing a GPT for the engine: its values into one block of memory, in a format."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

from gptfast.checkpoints.weight_files import room
from gptfast.engine.adapters import packed_adapters, shape_of
from gptfast.engine.compiled import CompiledGPT, Outside
from gptfast.engine.exponents import exponent_of, extremes, quantised
from gptfast.engine.formats import expert_of, format_name, matrix_formats, of_expert
from gptfast.engine.runner import PANEL
from gptfast.metadata import metadata_of
from gptfast.nn.difference import check_values, difference, true_config
from gptfast.nn.quantized import QuantizedLinear

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.transformer import Transformer

STRIPE = 1 << 21  # fp32 values of a matrix that are held at a time; more where the threads need more rows


def compile_model(
    model: Transformer,
    dtype: Any = "bfloat16",
    *,
    threads: int | None = None,
    max_rows: int | None = None,
    cache_dtype: Any = None,
) -> CompiledGPT:
    """Pack a GPT for the engine; see `GPT.compile_for_inference`."""
    name = format_name(dtype)
    config = _config_of(model)
    packer = Packer(config, name, threads=threads, max_rows=max_rows, cache_dtype=cache_dtype)
    adapters = packed_adapters(model, shape_of(config), name)
    values = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for key in packer.names:
        if key in values:
            x = values[key].detach()
            packer.take(key, tuple(x.shape), partial(_rows, x))
        elif (expert := expert_of(key)) is not None:
            x = of_expert(values[expert[0]].detach()[expert[1]])
            packer.take(key, tuple(x.shape), partial(_rows, x))
        else:
            layer = model.get_submodule(key.removesuffix(".weight"))
            assert isinstance(layer, QuantizedLinear)
            packer.take(key, (layer.out_features, layer.in_features), layer.reader())
    compiled = packer.finish()
    compiled.metadata, compiled._adapters = deepcopy(metadata_of(model)), adapters
    return compiled


def _rows(x: Tensor, first: int, last: int) -> Tensor:
    return x[first:last]


class Layout(NamedTuple):
    """How a model is packed. formats: of each kind of matrix. kinds: the formats of all weights by name, "" of vectors. size: of
    the packed weights in bytes."""

    formats: dict[str, str]
    kinds: dict[str, str]
    size: int


def layout_of(config: GPTConfig, dtype: Any, outside: Outside | None = None) -> Layout:
    """The layout of a model in a format, but for what is outside.

    Raises:
        ValueError: an unknown format.  RuntimeError: gptfast has no compiled part.
    """
    try:
        from gptfast import _C
    except ImportError as error:
        raise RuntimeError(
            f"compile_for_inference: gptfast was installed without its compiled part ({error}); install it with a C++ "
            "compiler, or use GPT.generate"
        ) from None
    formats, shape = matrix_formats(format_name(dtype)), shape_of(config)
    whole = {**formats, "outside": outside or {}}
    return Layout(formats, _C.weight_formats(shape, whole), _C.packed_bytes(shape, whole))


class Packer:
    """Packs the weights of a model one after another, in any order, a few rows of each in fp32 at a time.

    names: of all weights, as `GPT` calls its parameters.

    Args:
        config: of the model; its `tie_weights` says whether there is a head of its own.
        dtype: format of the matrices.
        weights: where to pack, memory of the layout's size; None: into new memory.
        after: called after each stripe of rows that is packed; None: nothing.
        outside: weights that are not packed, but used where they lie; None: there are none.
        options: threads, max_rows and cache_dtype, see `GPT.compile_for_inference`.
    Raises:
        ValueError: an unknown format, or options that are out of range.  RuntimeError: gptfast has no compiled part.
    """

    def __init__(
        self,
        config: GPTConfig,
        dtype: Any = "bfloat16",
        weights: Any = None,
        after: Callable[[], None] | None = None,
        outside: Outside | None = None,
        **options: Any,
    ) -> None:
        layout = layout_of(config, dtype, outside)
        self.outside = outside or {}
        self._kinds, self.names = layout.kinds, tuple(layout.kinds)
        if weights is None:  # zeroed, aligned to a page, and given back to the system at once when it is freed
            weights = mmap.mmap(-1, layout.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _ask_for_large_pages(weights)
        self._exponents: dict[str, int] = {}
        # the engine that packs has no exponents: these are known at the end
        self._made = partial(
            CompiledGPT, config, format_name(dtype), layout.formats, weights, outside=outside, **options
        )
        self._compiled = self._made()
        self._room = torch.empty(0)
        self._after = after or (lambda: None)

    def take(self, name: str, shape: tuple[int, ...], rows: Callable[[int, int], Tensor]) -> None:
        """Pack a weight.

        Args:
            name: of the weight.
            shape: (N, K) of a matrix, or (N,).
            rows: `rows(first, last)` gives these rows, of any float dtype; it may be called twice.
        Raises:
            ValueError: values that are not finite, or, with a quantised format, too small.
        """
        core, kind = self._compiled._core, self._kinds[name]
        if not kind:
            value = rows(0, shape[0])
            if name == "wpe.weight":  # rows are padded to whole panels
                value = torch.nn.functional.pad(value, (0, -shape[1] % PANEL)).flatten()
            value = self._fp32(value.flatten())  # tables of rotary positions lie as they are
            if not _finite(value):
                raise _not_finite(name)
            core.pack(name, to_dlpack(value), 0, 0)
            return
        each = max(STRIPE // shape[1] // PANEL, 2 * self._compiled.threads) * PANEL
        exponent = 0
        if quantised(kind):
            found = [extremes(x) for _, x in self._stripes(shape, rows, each)]
            if not all(math.isfinite(largest) for largest, _ in found):
                raise _not_finite(name)
            exponent = exponent_of(name, max(x for x, _ in found), min(x for _, x in found))
        for first, x in self._stripes(shape, rows, each):
            if not quantised(kind) and not _finite(x):
                raise _not_finite(name)
            core.pack(name, to_dlpack(x), first, exponent)
            self._after()
        if exponent:
            self._exponents[name] = exponent

    def _stripes(
        self, shape: tuple[int, ...], rows: Callable[[int, int], Tensor], each: int
    ) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, shape[0], each):
            yield first, self._fp32(rows(first, min(first + each, shape[0])))

    def _fp32(self, x: Tensor) -> Tensor:
        """x itself, or a copy of it in the one place for copies."""
        if x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous():
            return x
        if self._room.numel() < x.numel():
            self._room = room((x.numel(),), torch.float32)
        return self._room[: x.numel()].view(x.shape).copy_(x)

    def finish(self) -> CompiledGPT:
        """The packed model, after all of its weights."""
        return self._made(exponents=self._exponents) if self._exponents else self._compiled


def _finite(x: Tensor) -> bool:
    """Whether all values are, found without a tensor of that size."""
    return all(math.isfinite(float(end)) for end in x.aminmax())


def _not_finite(name: str) -> ValueError:
    return ValueError(f"compile_for_inference: {name} holds nan or infinities; the model is damaged")


def _config_of(model: Transformer) -> GPTConfig:
    """The true config of the model. Raises ValueError if its modules are not what its config says."""
    check_values("compile_for_inference", model)
    told = difference(model, adapters=True, codes=True)
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
