"""Matrix products, each in the way that a fixed rule names for this CPU; elsewhere torch's.

    own      csrc/cpu/gemm-inl.h: a row of the result depends on no other row and not on the number of threads; takes
             weights of another dtype as they are
    torch    torch.mm (MKL, OpenBLAS, oneDNN for bfloat16)
    onednn   oneDNN's linear, which torch uses for bfloat16 only

The rule looks at the CPU's instructions and the dtype, never at a clock: the ways round differently, so a choice by timing
would make the bits of a run depend on what else the machine did when it began. It is `own`, unless a library is far ahead
(docs/notes/cpu.md): `torch` for bfloat16 on CPUs with AMX, and where our kernels have no vectors. Products of fewer than
16 rows are torch's. GPTFAST_GEMM=own, torch or onednn forces one; a training run keeps the ways that its checkpoint names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES, cpu_isa
from gptfast.machine import has_amx

METHODS = ("own", "torch", "onednn")
FEW_ROWS = 16  # below, packing the second factor costs more than the product


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    accumulate: bool = False,
    a_sums: Tensor | None = None,
) -> None:
    """out = a b (+ bias) (+ out).

    Args:
        a: (M, K), and b: (K, N), contiguous along rows or columns.
        out: (M, N), rows contiguous; any float dtype.
        dtype: the dtype that is multiplied (sums are fp32); a and b are rounded to it where they have another.
        bias: (N,) or None.
        accumulate: add to what `out` holds.
        a_sums: (M,) float32, is filled with the sums of a's rows; a must be contiguous along its columns.
    """
    a, b = _dense(a), _dense(b)
    name = method(a, b, dtype)
    if name == "own":
        return torch.ops.gptfast.gemm(a, b, bias, out, dtype == torch.bfloat16, accumulate, a_sums)
    _LIBRARY[name](a, b, out, bias, dtype, accumulate)
    if a_sums is not None:
        torch.sum(a, 1, dtype=torch.float32, out=a_sums)


def method(a: Tensor, b: Tensor, dtype: torch.dtype) -> str:
    """The way in which `gemm` computes this product."""
    if dtype not in KERNEL_DTYPES or a.device.type != "cpu" or not (a.numel() and b.numel()):
        return "torch"
    if not _FORCED and a.shape[0] < FEW_ROWS:
        return "torch"
    name = _FORCED or _local.kept.get(_LAYOUTS[a.stride(1) != 1, b.stride(1) != 1, dtype]) or rule(dtype)
    # with AMX, oneDNN 3.x overran its own scratch memory in 200 x 1 by 1 x 31 of bfloat16
    return "torch" if name == "onednn" and min(*a.shape, b.shape[1]) < FEW_ROWS else name


def rule(dtype: torch.dtype) -> str:
    """The way of products in `dtype` on this CPU, where nothing else was asked for."""
    if dtype == torch.bfloat16 and has_amx():
        return "torch"
    return "torch" if cpu_isa() in (None, "scalar") else "own"


def methods_of(dtype: str) -> dict[str, str]:
    """The ways of products in `dtype` here and now, such as "float32": layout of the factors and dtype to method."""
    return {
        layout: _FORCED or _local.kept.get(layout) or rule(kind)
        for (_, _, kind), layout in _LAYOUTS.items()
        if layout.endswith(" " + dtype)
    }


def check_methods(methods: Mapping[str, str]) -> None:
    """Raise ValueError for what `methods_of` does not return."""
    for layout, name in methods.items():
        if name not in METHODS:
            raise ValueError(f"gemm: method of {layout} is {name!r}; expected one of {', '.join(METHODS)}")


@contextmanager
def multiplied_by(methods: Mapping[str, str]) -> Iterator[None]:
    """Inside the `with`, in this thread, products are computed as another process did, whose `methods_of` these are.

    Layouts that are not among them follow the rule; GPTFAST_GEMM still forces one.

    Raises:
        ValueError: unknown method.
    """
    check_methods(methods)
    before, _local.kept = _local.kept, dict(methods)
    try:
        yield
    finally:
        _local.kept = before


def forced() -> bool:
    """Whether GPTFAST_GEMM names the way."""
    return bool(_FORCED)


def _check_forced(name: str) -> str:
    if name and name not in METHODS:
        raise ValueError(f"GPTFAST_GEMM is {name!r}; expected one of {', '.join(METHODS)}, or unset")
    return name


class _Local(threading.local):
    def __init__(self) -> None:
        self.kept: dict[str, str] = {}


_local = _Local()
_LAYOUTS = {  # is a stored by columns, is b, dtype
    (a, b, dtype): f"{'nt'[a]}{'nt'[b]} {str(dtype)[6:]}"
    for a in (False, True)
    for b in (False, True)
    for dtype in KERNEL_DTYPES
}
_FORCED = _check_forced(os.environ.get("GPTFAST_GEMM", ""))


def _dense(x: Tensor) -> Tensor:
    """x, or a copy where neither its rows nor its columns are contiguous."""
    return x if x.stride(1) == 1 or x.stride(0) == 1 else x.contiguous()


def _torch(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, dtype: torch.dtype, accumulate: bool) -> None:
    a, b = a.to(dtype), b.to(dtype)
    if out.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16) and out.is_cuda and bias is None:
        # cuBLAS adds to a float32 result as it is; torch has this on CUDA only
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif out.dtype != dtype or bias is not None:
        product = a @ b if bias is None else torch.addmm(bias.to(dtype), a, b)
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _onednn(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, dtype: torch.dtype, accumulate: bool) -> None:
    bias = None if bias is None else bias.to(dtype).contiguous()  # whose stride is not looked at there
    product = torch.ops.mkldnn._linear_pointwise(a.to(dtype), b.t().to(dtype), bias, "none", [], "")
    out.add_(product) if accumulate else out.copy_(product)


_LIBRARY: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype, bool], None]] = {
    "torch": _torch,
    "onednn": _onednn,
}
