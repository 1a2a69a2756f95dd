"""CompiledGPT: a GPT packed for the native CPU engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast._checks import check_count
from gptfast._lazy import provided
from gptfast.backend import cpu_isa
from gptfast.engine import packed_file
from gptfast.engine.adapters import AdapterMethods, PackedAdapters, shape_of
from gptfast.engine.dequantized import dequantized
from gptfast.engine.formats import cache_dtype_of
from gptfast.engine.runner import EngineRunner
from gptfast.generation import generate
from gptfast.generation.runner import Runner, torch_num_threads
from gptfast.metadata import Metadata
from gptfast.nn.selection import one_a_row

if TYPE_CHECKING:
    from gptfast.config import GPTConfig


# By the parameter of the experts of a layer, blocks and scales of MXFP4, views of a `MappedFile`.
Outside = dict[str, tuple[memoryview, memoryview]]
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
MOST_THREADS = 1024  # a larger number is a mistake, and would take seconds to start


class CompiledGPT(AdapterMethods):
    """A model in the native engine (`csrc/engine`): packed weights and its own threads, without a torch module.

    Made by `from_pretrained`, `GPT.compile_for_inference` or `gptfast.engine.load`. The results of a sequence do not depend on the number of
    threads or on other sequences. Several threads may call it; calls take turns.

    config: configuration of the model.
    dtype: format of the weights.
    max_rows: maximum number of sequences at a time; None: no limit.
    cache_dtype: dtype of keys and values.
    metadata: of the checkpoint, as in `GPT`.
    base_mark: tells adapters of this base from others; "": it is unknown.
    """

    def __init__(
        self,
        config: GPTConfig,
        dtype: str,
        formats: dict[str, str],
        weights: Any,
        exponents: dict[str, int] | None = None,
        *,
        threads: int | None = None,
        max_rows: int | None = None,
        cache_dtype: Any = None,
        source: packed_file.PackedFile | None = None,
        outside: Outside | None = None,
    ) -> None:
        from gptfast import _C

        self.config, self.dtype, self.metadata = config, dtype, Metadata()
        if max_rows is not None:
            check_count("compile_for_inference", "max_rows", max_rows)
        self.max_rows = max_rows
        self.cache_dtype = cache_dtype_of(cache_dtype, dtype)
        self._formats, self._weights, self._source = formats, weights, source
        self._exponents, self._outside = exponents or {}, outside or {}
        mapped: dict[int, Any] = {id(part.obj): part.obj for parts in self._outside.values() for part in parts}
        self._files = list(mapped.values())
        self._adapters, self.base_mark = PackedAdapters(), ""
        threads = torch_num_threads() if threads is None else threads
        check_count("compile_for_inference", "threads", threads, 1, MOST_THREADS, ", better one per core")
        layout = {**formats, "exponents": self._exponents, "outside": self._outside}
        self._core = _C.Engine(shape_of(config), layout, weights, threads, self.cache_dtype, cpu_isa() or "scalar")

    @property
    def threads(self) -> int:
        """Number of threads that compute."""
        return self._core.threads

    @property
    def nbytes(self) -> int:
        """Size of the packed weights, of those that a mapped checkpoint has, and of the adapters beside them, in bytes."""
        mapped = sum(part.nbytes for parts in self._outside.values() for part in parts)
        return memoryview(self._weights).nbytes + mapped + self._adapters.nbytes

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: str | torch.dtype = "bfloat16",
        *,
        threads: int | None = None,
        max_rows: int | None = None,
        cache_dtype: str | torch.dtype | None = None,
        file: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        **config_overrides: Any,
    ) -> CompiledGPT:
        """Pack a checkpoint without loading it first: the same weights, to the bit, as of
        `GPT.from_pretrained(path).compile_for_inference(dtype)`, but beside them no more than one matrix is in memory.

        With "mxfp4" the experts of a checkpoint of gpt-oss in MXFP4 are not packed: its files are mapped, and read as they lie.

        Args:
            path, revision, config_overrides: as in `GPT.from_pretrained`.
            dtype, threads, max_rows, cache_dtype: as in `GPT.compile_for_inference`.
            file: pack into this file, as `save` writes it, and map it: then the packed model need not fit into memory either.
                None: into memory. All weights are then in that file, MXFP4 too.
        Raises:
            OSError, ValueError: as these. An existing file then stays as it was.
        """
        load = provided("packed").load
        options = {"threads": threads, "max_rows": max_rows, "cache_dtype": cache_dtype}
        return load(path, dtype, config_overrides, file, revision, **options)

    def with_adapters(self, adapters: PackedAdapters) -> CompiledGPT:
        """A model with other adapters that shares the weights."""
        other = self.with_threads(self.threads)
        other._adapters = adapters
        return other

    def with_threads(self, threads: int | None) -> CompiledGPT:
        """A model with other threads that shares weights and adapters. threads: None: as many as torch uses."""
        other = CompiledGPT(
            self.config,
            self.dtype,
            self._formats,
            self._weights,
            self._exponents,
            threads=threads,
            max_rows=self.max_rows,
            cache_dtype=self.cache_dtype,
            source=self._source,
            outside=self._outside,
        )
        other.metadata, other._adapters, other.base_mark = self.metadata, self._adapters, self.base_mark
        return other

    def check_weights(self) -> None:
        """Raise OSError if the weights are mapped from a file that has changed; see `PackedFile.check`, `MappedFile.check`."""
        if self._source is not None:
            self._source.check()
        for file in self._files:
            file.check()

    def runner(self, max_slots: int = 1, max_len: int | None = None) -> EngineRunner:
        """A runner for these weights; see `gptfast.generation.Runner`. Keys and values take memory as they come."""
        return self._runner(self._adapters, max_slots, max_len)

    def _runner(self, adapters: PackedAdapters, max_slots: int, max_len: int | None) -> EngineRunner:
        check_count("runner", "max_slots", max_slots)
        if self.max_rows is not None and max_slots > self.max_rows:
            raise ValueError(
                f"runner: max_slots is {max_slots} and the model was compiled with max_rows={self.max_rows}; compile it with "
                "more, or run fewer sequences at a time"
            )
        another = partial(self._runner, adapters)
        return EngineRunner(self._core, self.config, max_slots, max_len, self.check_weights, another, adapters)

    def logits(self, ids: Any, adapter_names: Sequence[str] | None = None) -> Tensor:
        """fp32 logits (B, T, V) for token ids (B, T), or (T, V) for (T,).

        Args:
            adapter_names: the adapter of each row, "__base__" for none; None: the active ones.
        Raises:
            TypeError, ValueError: not token ids, ids outside the vocabulary, more than block_size positions, or names that
                are unknown or not one a row.
        """
        try:
            ids = torch.as_tensor(ids, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"logits: ids is no tensor of token ids ({error}); expected (B, T) or (T,)") from None
        if ids.dim() not in (1, 2) or ids.dtype not in ID_DTYPES or ids.numel() == 0:
            raise ValueError(
                f"logits: ids has shape {tuple(ids.shape)}, {ids.dtype}; expected (B, T) or (T,) token ids"
            )
        rows = ids[None] if ids.dim() == 1 else ids
        runner: Runner = self.runner(1)
        parts = []
        names = [None] * len(rows) if adapter_names is None else one_a_row("logits", adapter_names, len(rows))
        for row, name in zip(rows.tolist(), names, strict=True):
            (slot,) = runner.allocate(1, name)
            parts += runner.extend([slot], [row], last_only=False)
            runner.free(slot)
        return parts[0] if ids.dim() == 1 else torch.stack(parts)

    def generate(self, ids: Any = None, max_new_tokens: int | None = None, **options: Any) -> Any:
        """Continue prompts, with the options and default end tokens of `GPT.generate`."""
        ends = self.metadata.ends(self.config.vocab_size)
        return generate(self, ids, **{**ends, "max_new_tokens": max_new_tokens, **options})

    def dequantized(self) -> Any:
        """A float32 `GPT` on the CPU with the weights that the engine computes with, so that torch can check what a format costs.

        Its logits differ from those of `logits` by the rounding of activations alone: the engine multiplies bytes with the
        quantised formats, and bfloat16 with "bfloat16" where the CPU has instructions for it (docs/notes/engine.md).

        Raises:
            ValueError: the model has adapters, which are not part of these weights.  OSError: see `check_weights`.
        """
        if self.adapters:
            raise ValueError(
                f"dequantized: the model has the adapter {', '.join(map(repr, self.adapters))}, and the result is the base alone; take "
                "them out with delete_adapter, and load_adapter them into the result"
            )
        model = dequantized(self.config, self.metadata, self._core)
        self.check_weights()
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the packed model to a file for `gptfast.engine.load`.

        Raises:
            OSError: it cannot be written; an existing file stays as it was.  ValueError: the model has adapters, or a mapped
                checkpoint has its experts.
        """
        if self.adapters:
            raise ValueError(
                f"save: the model has the adapter {', '.join(map(repr, self.adapters))}, and the file is for the base alone; "
                "write adapters with GPT.save_adapter, take them out here with delete_adapter, and load_adapter them beside the file"
            )
        if self._outside:
            raise ValueError(
                "save: the experts are read from the mapped checkpoint; for a file with all weights say `file` in "
                "CompiledGPT.from_pretrained"
            )
        packed_file.save(path, self.description(), memoryview(self._weights), self.check_weights)

    def description(self) -> dict[str, Any]:
        """What the header of a file of this model says, but for the size and checksum of its weights."""
        return packed_file.described(
            self.config, self._formats, self._exponents, self.dtype, self.metadata, self.base_mark
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "CompiledGPT: it owns threads and cannot be pickled or copied deeply; use save(path) and gptfast.engine.load(path), "
            "or compile again"
        )

    def __repr__(self) -> str:
        c = self.config
        return (
            f"CompiledGPT({c.n_layer} layers, {c.n_embd} channels, {self.dtype}, {self.nbytes / 1e6:.0f} MB, "
            f"{self.threads} threads)"
        )
