"""The engine behind a GPT that did not ask for it: packed once, again when its weights have changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gptfast.backend import AUTOMATIC, chosen, has_cpu_ops
from gptfast.engine.compiled import CompiledGPT, compile_model
from gptfast.generation.sequences import usual_threads

if TYPE_CHECKING:
    from gptfast.models import GPT

Fingerprint = tuple[tuple[tuple[int, int], ...], int]
PLAIN_TORCH = (nn.Embedding, nn.ModuleList)
SAMPLES = 61  # values of each parameter that are compared; a prime, so that strides fall on all columns
_packed: WeakKeyDictionary[GPT, tuple[Fingerprint, CompiledGPT]] = WeakKeyDictionary()
_packing = threading.Lock()  # callers on several threads share one copy; a fork waits, or its child would for ever
os.register_at_fork(before=_packing.acquire, after_in_parent=_packing.release, after_in_child=_packing.release)


def engine_for(model: GPT) -> CompiledGPT | None:
    """A compiled model with the weights that `model` has now and in their dtype, or None where it cannot serve.

    It serves plain GPTs (no hooks, no modules but `gptfast.nn`'s own) in evaluation mode on the CPU, all of fp32 or all of
    bf16, of which a packed copy fits into half of the memory that is free, where no other backend was asked for, and no
    autocast. The copy is kept for the next call, and made anew after an optimizer step or a load.
    """
    asked = AUTOMATIC["cpu"][0] if chosen() == "auto" else chosen()
    if not has_cpu_ops or model.training or asked != "cpu" or torch.is_autocast_enabled("cpu") or not _is_plain(model):
        return None
    parameters = list(model.parameters())
    dtype = parameters[0].dtype
    if dtype not in (torch.float32, torch.bfloat16) or any(
        parameter.device.type != "cpu" or parameter.dtype != dtype for parameter in parameters
    ):
        return None
    with _packing:
        fingerprint = _fingerprint(parameters)
        known = _packed.get(model)
        if known is not None and known[0] == fingerprint:
            if known[1].threads != usual_threads():
                _packed[model] = known = fingerprint, known[1].with_threads(None)
            return known[1]
        _packed.pop(model, None)
        del known  # the old copy is freed before the new one is made
        if sum(parameter.nbytes for parameter in parameters) > _free_memory() / 2:
            return None
        try:
            compiled = compile_model(model, dtype)
        except ValueError:  # weights that are not finite, of which torch can run some
            return None
        _packed[model] = fingerprint, compiled
        return compiled


def _is_plain(model: GPT) -> bool:
    """Whether a forward of the model is what its config and its parameters say."""
    from gptfast.models import GPT

    if type(model) is not GPT:
        return False
    return all(
        (type(module).__module__.startswith(("gptfast.nn.", "gptfast.models.")) or type(module) in PLAIN_TORCH)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in vars(module)
        for module in model.modules()
    )


def _fingerprint(parameters: Sequence[Tensor]) -> Fingerprint:
    """Changes with every optimizer step and every load.

    `_version` counts changes in place, but not those through `.data`: a few values of each parameter show these.
    """
    places = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
    samples = [p.detach().reshape(-1)[:: max(1, p.numel() // SAMPLES)] for p in parameters]
    return places, hash(torch.cat(samples).view(torch.uint8).numpy().tobytes())


def _free_memory() -> int:
    """Bytes that can be had without swapping: what caches of files hold counts as free."""
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable:")))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
