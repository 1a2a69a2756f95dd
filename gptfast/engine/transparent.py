"""The engine behind a GPT that did not ask for it: packed once, again when its weights have changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

from gptfast.backend import AUTOMATIC, chosen, cpu_isa, has_cpu_ops
from gptfast.engine.compiled import CompiledGPT, compile_model
from gptfast.generation.runner import usual_threads
from gptfast.nn.difference import difference, true_config

if TYPE_CHECKING:
    from gptfast.nn.transformer import Transformer

Fingerprint = tuple[Any, torch.dtype, int]
_packed: WeakKeyDictionary[Transformer, tuple[Fingerprint, CompiledGPT]] = WeakKeyDictionary()
_packing = threading.Lock()  # callers on several threads share one copy; a fork waits, or its child would for ever
os.register_at_fork(before=_packing.acquire, after_in_parent=_packing.release, after_in_child=_packing.release)


def engine_for(model: Transformer) -> CompiledGPT | None:
    """A compiled model with the weights that `model` has now and in their dtype, or None where it cannot serve.

    It serves GPTs whose modules are what their config says (see `gptfast.nn.difference`), in evaluation mode on the
    CPU, all of fp32 or all of bf16, of which a packed copy fits into half of the memory that is free, where no other
    backend was asked for, and no autocast. The copy is kept for the next call, which reads all of the weights once to see
    that they are the same; hold the compiled model to spare that (then it stays what it is), and see `forget`.
    """
    asked = AUTOMATIC["cpu"][0] if chosen() == "auto" else chosen()
    if not has_cpu_ops or model.training or asked != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    tensors = [x.detach() for x in (*model.parameters(), *model.buffers())]
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.bfloat16) or any(x.device.type != "cpu" or x.dtype != dtype for x in tensors):
        return None
    if difference(model) is not None:
        return None
    fingerprint = true_config(model), dtype, checksum(tensors)
    with _packing:
        known = _packed.get(model)
        if known is not None and known[0] == fingerprint:
            if known[1].threads != usual_threads():
                _packed[model] = known = fingerprint, known[1].with_threads(None)
            return known[1]
        _packed.pop(model, None)
        del known  # the old copy is freed before the new one is made
        if sum(x.nbytes for x in tensors) > _free_memory() / 2:
            return None
        try:
            compiled = compile_model(model, dtype)
        except ValueError:  # weights that are not finite, of which torch can run some
            return None
        _packed[model] = fingerprint, compiled
        return compiled


def forget(model: Transformer) -> None:
    """Free the packed copy that `generate` keeps of a model; the next `generate` makes a new one."""
    with _packing:
        _packed.pop(model, None)


def checksum(tensors: Sequence[Tensor]) -> int:
    """64 bits that tell whether any byte of CPU tensors has changed, at the speed of reading them.

    Nothing less will do: a write through `.data` or numpy leaves no other trace. One value that changes always changes
    the checksum, several but for a chance of 2^-64.
    """
    from gptfast import _C

    read = [to_dlpack(_as_it_lies(x)) for x in tensors]
    return _C.checksum(read, usual_threads(), cpu_isa() or "scalar")


def _as_it_lies(x: Tensor) -> Tensor:
    """The tensor's bytes without a copy, where its transpose is contiguous too."""
    transposed = x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous()
    return x.t() if transposed else x.contiguous()


def _free_memory() -> int:
    """Bytes that can be had without swapping: what caches of files hold counts as free."""
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable:")))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
