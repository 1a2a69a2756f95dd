"""Transparent engine for `GPT.runner`: packs the weights on first use, and again when they have changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

from gptfast.backend import AUTOMATIC, chosen, cpu_isa, has_cpu_ops
from gptfast.engine.adapters import packed_adapters, shape_of, unsupported, updates_of
from gptfast.engine.compiled import CompiledGPT
from gptfast.engine.packing import compile_model
from gptfast.generation.runner import torch_num_threads
from gptfast.nn.adapted import adapter_modules
from gptfast.nn.difference import difference, true_config
from gptfast.nn.rotary import ROTARY_TABLES
from gptfast.nn.soft_prompt import prompts_of

if TYPE_CHECKING:
    from gptfast.nn.transformer import Transformer

Fingerprint = tuple[Any, torch.dtype, int]


class Packed(NamedTuple):
    """A packed copy of a model, with fingerprints of the base and the adapters that it was made from."""

    base: Fingerprint
    adapters: tuple[Any, ...]
    compiled: CompiledGPT


_packed: WeakKeyDictionary[Transformer, Packed] = WeakKeyDictionary()
_packing = threading.Lock()  # threads share one copy; a fork waits for it, or the child would wait for ever
os.register_at_fork(before=_packing.acquire, after_in_parent=_packing.release, after_in_child=_packing.release)


def engine_for(model: Transformer) -> CompiledGPT | None:
    """A compiled model with the present weights of `model`, in their dtype; None where the engine cannot run it.

    The engine runs a GPT in evaluation mode on the CPU whose weights are all fp32 or all bf16 and whose modules are what its
    config says (see `gptfast.nn.difference`), low-rank updates and soft prompts apart, if a packed copy fits into half of the
    free memory, no other backend was chosen and autocast is off.

    The copy is kept. Each call compares it with all of the weights and the state of the adapters, which takes one read of
    them; hold the compiled model to avoid that. It does not follow later changes of the weights. See `forget`.
    """
    asked = AUTOMATIC["cpu"][0] if chosen() == "auto" else chosen()
    if not has_cpu_ops or model.training or asked != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if unsupported(model.config) is not None:
        return None
    of_adapters = adapter_modules(model)
    parameters = [(name.rpartition(".")[0] in of_adapters, x.detach()) for name, x in model.named_parameters()]
    weights, factors = [x for own, x in parameters if not own], [x for own, x in parameters if own]
    tables = [x.detach() for name, x in model.named_buffers() if name in ROTARY_TABLES]  # fp32 in any model
    weights += [x.detach() for name, x in model.named_buffers() if name not in ROTARY_TABLES]
    tensors, dtype = weights + tables, weights[0].dtype
    if dtype not in (torch.float32, torch.bfloat16) or any(x.dtype != dtype for x in weights):
        return None
    if any(x.device.type != "cpu" for x in (*tensors, *factors)) or difference(model, adapters=True) is not None:
        return None
    base, adapters = (true_config(model), dtype, checksum(tensors)), _adapters_of(model, factors)
    with _packing:
        known = _packed.get(model)
        try:
            if known is None or known.base != base:
                _packed.pop(model, None)
                del known  # the old copy is freed before the new one is made
                if sum(x.nbytes for x in tensors) > _free_memory() / 2:
                    return None
                compiled = compile_model(model, dtype)
            elif known.adapters != adapters:
                own = packed_adapters(model, shape_of(known.compiled.config), known.compiled.dtype)
                compiled = known.compiled.with_threads(None).with_adapters(own)
            elif known.compiled.threads != torch_num_threads():
                compiled = known.compiled.with_threads(None)
            else:
                return known.compiled
        except ValueError:  # values that are not finite, of which torch can run some
            return None
        _packed[model] = Packed(base, adapters, compiled)
        return compiled


def _adapters_of(model: Transformer, factors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What the adapters of a model are: another value where anything about them has changed."""
    if model.adapters is None or not factors:
        return ()
    where = [(name, [(u.number, u.scale, *u.a.shape) for u in own]) for name, own in updates_of(model).items()]
    prompts = [(name, len(prompt)) for name, prompt in prompts_of(model).items()]
    return repr((where, prompts)), model.adapters.active, model.adapters.enabled, checksum(factors)


def forget(model: Transformer) -> None:
    """Free the packed copy of a model; the next use of the engine makes a new one."""
    with _packing:
        _packed.pop(model, None)


def checksum(tensors: Sequence[Tensor]) -> int:
    """64-bit checksum of the bytes of CPU tensors, at the speed of reading them.

    A write through `.data` or numpy leaves no other trace. A change of one value always changes the checksum, a change of
    several does so except with probability 2^-64.
    """
    from gptfast import _C

    read = [to_dlpack(_as_it_lies(x)) for x in tensors]
    return _C.checksum(read, torch_num_threads(), cpu_isa() or "scalar")


def _as_it_lies(x: Tensor) -> Tensor:
    """The tensor's bytes without a copy, where its transpose is contiguous too."""
    transposed = x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous()
    return x.t() if transposed else x.contiguous()


def _free_memory() -> int:
    """Bytes available without swapping; the page cache counts as free."""
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("MemAvailable:")))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
