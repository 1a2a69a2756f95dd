"""The engine behind a GPT that did not ask for it: packed once, again when its weights have changed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from gptfast.backend import has_cpu_ops
from gptfast.engine.compiled import CompiledGPT, compile_model

if TYPE_CHECKING:
    from gptfast.models import GPT

Fingerprint = tuple[tuple[int, int], ...]
_packed: WeakKeyDictionary[GPT, tuple[Fingerprint, CompiledGPT]] = WeakKeyDictionary()


def engine_for(model: GPT) -> CompiledGPT | None:
    """A compiled model with the weights that `model` has now and in their dtype, or None where it cannot serve.

    It serves models in evaluation mode on the CPU, all of fp32 or all of bf16, of which a packed copy fits into half of the
    memory that is free. The copy is kept for the next call, and made anew after an optimizer step or a load.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    devices = {parameter.device.type for parameter in model.parameters()}
    if not has_cpu_ops or model.training or devices != {"cpu"} or len(dtypes) != 1:
        return None
    (dtype,) = dtypes
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    # _version counts changes in place; optimizers, load_state_dict and copy_ make them
    fingerprint = tuple(
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    )
    known = _packed.get(model)
    if known is not None and known[0] == fingerprint and known[1].threads == torch.get_num_threads():
        return known[1]
    _packed.pop(model, None)
    if sum(parameter.nbytes for parameter in model.parameters()) > _free_memory() / 2:
        return None
    compiled = compile_model(model, dtype)
    _packed[model] = fingerprint, compiled
    return compiled


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
