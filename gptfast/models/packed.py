"""Loading a checkpoint straight into the native engine: a matrix at a time is read, and some rows of it are held in fp32."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast._files import atomic_path
from gptfast._pages import drop_code
from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.mxfp4 import check_scales
from gptfast.checkpoints.weight_files import StoredTensor
from gptfast.config import GPTConfig
from gptfast.engine.compiled import CompiledGPT, Outside
from gptfast.engine.exponents import SMALLEST, quantised
from gptfast.engine.formats import EXPERTS, format_name, of_expert
from gptfast.engine.loading import load as open_packed
from gptfast.engine.packed_file import Draft, described
from gptfast.engine.packing import Packer, layout_of
from gptfast.engine.runner import PANEL
from gptfast.models.locate import resolve
from gptfast.models.pretrained import on_meta, read_weights
from gptfast.models.quantized import mark_of, sample
from gptfast.models.stored import StoredModel
from gptfast.nn.rotary import ROTARY_TABLES
from gptfast.nn.transformer import Transformer


def load(
    path: str | os.PathLike[str],
    dtype: Any,
    overrides: dict[str, Any],
    file: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    **options: Any,
) -> CompiledGPT:
    """A packed model from a checkpoint; see `CompiledGPT.from_pretrained`."""
    stored = StoredModel(resolve(path, revision))
    if file is None:
        return build(stored, dtype, overrides, **options)
    config = stored.config.replace(**overrides)
    layout = layout_of(config, dtype)
    most = {name: SMALLEST for name, kind in layout.kinds.items() if quantised(kind)}
    longest = described(config, layout.formats, most, format_name(dtype), stored.metadata, mark_of(()))
    with atomic_path(file) as temporary:
        draft = Draft(temporary, layout.size, longest)
        packer = Packer(config, dtype, draft.weights, draft.drop, **options)
        draft.finish(_packed(stored, config, packer).description())
    return open_packed(file, **options)


def build(stored: StoredModel, dtype: Any, overrides: dict[str, Any] | None = None, **options: Any) -> CompiledGPT:
    """As `load`, into memory, from files that are open already."""
    config = stored.config.replace(**overrides or {})
    return _packed(stored, config, Packer(config, dtype, outside=_outside(stored, config, dtype), **options))


def _outside(stored: StoredModel, config: GPTConfig, dtype: Any) -> Outside:
    """What the engine reads where it lies, in the mapped files: the experts in MXFP4, if it is all of them in whole panels.

    Raises:
        ValueError: a scale that is no number.
    """
    found: Outside = {}
    if format_name(dtype) != "mxfp4" or config.n_expert is None:
        return found
    E, C, F = config.n_expert, config.n_embd, config.inner_dim
    shapes = {"gate_up_proj": (E, C, 2 * F), "down_proj": (E, F, C)}
    for key, tensor in stored.tensors():
        name = hf_layout.from_file(key) or key
        if tensor.mxfp4 is None or tensor.shape != shapes.get(name.rpartition(".")[2]) or tensor.shape[2] % PANEL:
            continue
        blocks, scales = tensor.mxfp4
        if blocks.mapped is not None and scales.mapped is not None:
            found[name] = (blocks.mapped(), scales.mapped())
            check_scales(int(np.frombuffer(found[name][1], np.uint8).max()), f"{stored.path}: {key}_scales")
    return found if len(found) == 2 * config.n_layer else {}


def _packed(stored: StoredModel, config: GPTConfig, packer: Packer) -> CompiledGPT:
    model = on_meta(Transformer, config)
    drop_code()  # before there are weights: the peak is lower too
    packing = _EnginePacking(config, packer)
    read_weights(stored, model, None, packing)
    matrices = [f"h.{name}" for name, x in model.h.named_parameters() if x.dim() == 2]
    compiled = packing.finish(model)
    compiled.metadata = deepcopy(stored.metadata)
    compiled.base_mark = mark_of(packing.samples[name] for name in matrices)
    return compiled


class _EnginePacking:
    """Packs the tensors of a checkpoint as they come.

    samples: numbers of each matrix of the blocks, see `gptfast.models.adapters.files.base_mark`.
    """

    def __init__(self, config: GPTConfig, packer: Packer) -> None:
        self._config, self._packer = config, packer
        self.samples: dict[str, bytes] = {}
        self._embedding: torch.dtype | None = None  # of which it is, once it is packed

    def take(self, name: str, stored: StoredTensor, transposed: bool, dtype: torch.dtype | None) -> bool:
        """Pack a tensor. All are taken; of a tied head and its embedding either may be stored, or both."""
        if name == "wte.weight" or (name == "lm_head.weight" and self._config.tie_weights):
            if self._embedding is not None:
                return True
            name, self._embedding = "wte.weight", stored.dtype
        if name in self._packer.outside:
            return True
        if name.rpartition(".")[2] in EXPERTS:
            whole = stored.read()
            if whole.dim() == 2:
                self.samples[name] = sample(whole)
            for e, x in enumerate(map(of_expert, whole)):
                self._packer.take(f"{name}.{e}", tuple(x.shape), partial(_rows, x))
            return True
        shape, rows = stored.shape, stored.read
        if name == "wpe.weight":
            shape = (min(shape[0], self._config.block_size), *shape[1:])
        if name.startswith("h.") and len(shape) == 2:
            whole = stored.read().t() if transposed else stored.read()
            shape, rows = tuple(whole.shape), partial(_rows, whole)
            self.samples[name] = sample(whole)
        self._packer.take(name, shape, rows)
        return True

    def finish(self, model: Transformer) -> CompiledGPT:
        """The packed model. model: has what is computed and not stored: sinusoids, in the embedding's dtype, or rotary tables."""
        if self._config.position_embedding == "sinusoidal":
            table = model.wpe.weight.to(self._embedding)
            self._packer.take("wpe.weight", tuple(table.shape), partial(_rows, table))
        for name, table in model.named_buffers():
            if name in ROTARY_TABLES:
                self._packer.take(name, tuple(table.shape), partial(_rows, table))
        return self._packer.finish()


def _rows(x: Tensor, first: int, last: int) -> Tensor:
    return x[first:last]
