"""Which implementation runs an op: the backends, which register themselves, and the choice among them.

Importing this loads the compiled libraries (`gptfast/_libraries.py`). `auto` takes the first backend that can run the
call. An explicit choice (argument, `gptfast.backend(...)` or GPTFAST_BACKEND) never falls back: it raises with the cause
and the remedy.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from gptfast._libraries import REBUILD, has_cpu_ops, missing_cuda_reason, missing_reason

BACKENDS = ("auto", "cpu", "cuda", "triton", "eager")  # the names for users
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops.

    name: as in `backend=...`.
    namespace: where its kernels are in torch.ops, under the same names and schemas for all backends.
    device: type of the device on which its tensors are, "cpu" or "cuda".
    unavailable_reason: why it cannot run on GPU number i (None: the current one), and what to do; None where it can.
    automatic: whether "auto" may choose it, after those that were registered before it for the device.
    """

    name: str
    namespace: str
    device: str
    unavailable_reason: Callable[[int | None], str | None]
    automatic: bool = True


AUTOMATIC: dict[str, list[str]] = {}  # the backends that "auto" tries for tensors on a device, in order
_backends: dict[str, Backend] = {}
_ops: dict[str, set[str]] = {}  # of each backend, looked up once: torch.compile cannot follow the dispatcher


def register(new: Backend) -> None:
    """Add a backend whose kernels torch.ops has by now; one of the same name is replaced."""
    _backends[new.name] = new
    absent = new.device == "cpu" and new.unavailable_reason(None) is not None  # each call asks its GPU, and no CPU
    _ops[new.name] = set() if absent else ops_of(new.name)
    tried = AUTOMATIC.setdefault(new.device, [])
    if new.automatic and new.name not in tried:
        tried.append(new.name)


PRODUCTS = {"linear", "grouped_linear", "moe"}
"""Ops that a backend without kernels of its own has too: their products are PyTorch's there."""


def ops_of(name: str) -> set[str]:
    """The public ops that the loaded libraries of a backend have kernels for."""
    key, prefix = _backends[name].device.upper(), _backends[name].namespace + "::"
    found = {
        full.removeprefix(prefix).removesuffix("_fwd")
        for full in torch._C._dispatch_get_all_op_names()
        if full.startswith(prefix) and torch._C._dispatch_has_kernel_for_dispatch_key(full, key)
    }
    if "cross_entropy" in found:
        found |= {"linear_cross_entropy", "linear_logprobs"}
    return found | PRODUCTS if found else found


def has_kernel(op: str, name: str) -> bool:
    """Whether the backend has a kernel for this public op."""
    return op in _ops[name]


def namespace_of(name: str) -> str:
    """Where the operators of a backend are in torch.ops."""
    return _backends[name].namespace


def kernels(name: str) -> Any:
    """The operators of a backend, under the same names for all: `kernels("cpu").gelu_fwd`."""
    return getattr(torch.ops, _backends[name].namespace)


def unavailable_reason(name: str, index: int | None = None) -> str | None:
    """Why a backend cannot run on GPU number `index` (None: the current one), and what to do; None where it can."""
    return _backends[name].unavailable_reason(index)


_cuda_reasons: dict[int, str | None] = {}  # of the GPUs that were asked


def _cpu_unavailable_reason(_: int | None) -> str | None:
    return None if missing_reason is None else f"{missing_reason}. To build: {REBUILD}"


def _cuda_unavailable_reason(index: int | None) -> str | None:
    """As `Backend.unavailable_reason`. The GPU is asked once, here and not at import: a process that has touched CUDA cannot
    fork workers."""
    if missing_cuda_reason is not None:
        return missing_cuda_reason
    index = torch.cuda.current_device() if index is None else index
    if index not in _cuda_reasons and torch.compiler.is_compiling():
        return None  # not a question that can be traced; the launch would say
    if index not in _cuda_reasons:
        _cuda_reasons[index] = torch.ops.gptfast.cuda_unavailable_reason(index) or None
    return _cuda_reasons[index]


register(Backend("cpu", "gptfast", "cpu", _cpu_unavailable_reason))
register(Backend("cuda", "gptfast", "cuda", _cuda_unavailable_reason))


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS and name not in _backends:
        raise ValueError(f"{where}: backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


_default: str = _checked(os.environ.get("GPTFAST_BACKEND", "auto") or "auto", "GPTFAST_BACKEND")


class _Local(threading.local):
    choice: str | None = None


_local = _Local()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every gptfast op called inside the `with`, in this thread.

    Args:
        name: "auto", "cpu", "cuda", "triton" or "eager".
    Raises:
        ValueError: unknown name.
    """
    previous, _local.choice = _local.choice, _checked(name, "gptfast.backend")
    try:
        yield
    finally:
        _local.choice = previous


def chosen() -> str:
    """The backend asked for in this thread: by `backend(...)`, else by GPTFAST_BACKEND, else "auto"."""
    return _local.choice or _default


def resolve(op: str, choice: str | None, x: Tensor, *others: Tensor | None) -> str:
    """The backend that runs `op` on `x`: "cpu", "cuda", "triton" or "eager".

    Args:
        op: its name, also for messages.
        choice: the call's `backend=` argument, or None for the surrounding choice.
        x: the op's main input.
        others: inputs that may be of another dtype.
    Raises:
        ValueError, TypeError, RuntimeError: the explicit choice cannot run this call.
    """
    name = choice or chosen()
    if name == "eager":
        return name
    if name == "auto":
        for y in others:
            if y is not None and y.dtype not in KERNEL_DTYPES:
                return "eager"
        return "eager" if transformed() else _automatic(op, x)
    strange = [y.dtype for y in others if y is not None and y.dtype not in KERNEL_DTYPES]
    _checked(name, op)
    _check_explicit(op, name, x, *strange)
    return name


# under names that are found at once: every call of an op asks
_is_compiling, _in_transform = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, …) or forward-mode AD is active, which cannot look into kernels."""
    if _is_compiling():
        return False
    return _in_transform() or forward_ad._current_level >= 0


def is_many(x: Tensor) -> bool:
    """Whether a tensor of a backward pass is batched over several passes: under vmap, or where
    torch.autograd.grad(is_grads_batched=True) made it."""
    if _is_compiling():
        return False
    return _in_transform() or is_legacy_batchedtensor(x)


def has_values(x: Tensor) -> bool:
    """Whether a check may look at the values of a tensor: not on meta, where there are none, and not under torch.func."""
    return x.device.type != "meta" and not transformed()


def _automatic(op: str, x: Tensor) -> str:
    if x.dtype not in KERNEL_DTYPES:
        return "eager"
    kind = "cpu" if x.is_cpu else x.device.type  # the name alone takes half a microsecond
    for name in AUTOMATIC.get(kind, ()):
        if op in _ops[name] and (kind == "cpu" or _backends[name].unavailable_reason(x.device.index) is None):
            return name
    return "eager"


def _check_explicit(op: str, name: str, x: Tensor, *strange: torch.dtype) -> None:
    asked = f"{op}: backend={name!r} was asked for, but"
    reason = unavailable_reason(name, x.device.index if x.device.type == "cuda" else None)
    if reason is not None:
        raise RuntimeError(f"{asked} {reason}; use backend='auto' or 'eager' (`gptfast doctor` says what runs here)")
    if transformed():
        raise RuntimeError(
            f"{asked} torch.func (vmap, grad, jvp, ...) and forward-mode AD cannot look into its kernels; use "
            "backend='eager', which 'auto' takes there"
        )
    if not has_kernel(op, name):
        raise RuntimeError(f"{asked} it has no kernel for this op; use backend='auto' or 'eager'")
    if x.device.type != _backends[name].device:
        raise ValueError(f"{asked} the input is on {x.device}; move it or use 'auto'")
    for dtype in (*strange, *(() if x.dtype in KERNEL_DTYPES else (x.dtype,))):
        raise TypeError(
            f"{op}: backend={name!r} computes float32, bfloat16 and float16, got {dtype}; use backend='eager'"
        )


def cpu_isa() -> str | None:
    """Name of the instruction set that the CPU kernels use now, or None without compiled ops."""
    return torch.ops.gptfast.cpu_isa() if has_cpu_ops else None


# The instruction sets that multiply pairs of bfloat16, and what they are called.
BFLOAT16_ISAS = {"avx512_bf16": "AVX-512 BF16", "amx": "AMX", "neon_bf16": "Arm's BF16"}


def cpu_isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine can run, worst first."""
    return torch.ops.gptfast.cpu_isas().split(",") if has_cpu_ops else []


@contextmanager
def force_cpu_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set inside the `with` (process-wide; for tests and benchmarks)."""
    if name not in cpu_isas():
        raise ValueError(f"force_cpu_isa: {name!r} cannot run here; available: {', '.join(cpu_isas()) or 'none'}")
    previous = cpu_isa()
    torch.ops.gptfast.set_cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.gptfast.set_cpu_isa(previous)


class _CallableModule(ModuleType):
    """`gptfast.backend("eager")`: the package has the module under the name of its most used function."""

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return backend(name)


sys.modules[__name__].__class__ = _CallableModule
