"""Matrix products, by the implementation that a fixed rule names for this CPU; on other devices torch's.

    own      csrc/cpu/gemm-inl.h: a row of the result depends on no other row and not on the number of threads; reads
             weights of another dtype without a converted copy
    torch    torch.mm (MKL, OpenBLAS, oneDNN for bfloat16)
    onednn   oneDNN's linear, which torch uses for bfloat16 only; `torch` where oneDNN does not multiply the dtype on this CPU

The rule depends on the CPU's instructions and the dtype, never on timing: implementations round differently, so a timed
choice would make the bits of a run depend on the load of the machine when it started. It is `own`, except where a library
is much faster (docs/notes/cpu.md): `torch` for bfloat16 on CPUs with AMX, but for products of groups, and where our kernels have no
vectors. Products of fewer than 16 rows run in torch, but for those of `grouped_gemm`. GPTFAST_GEMM=own, torch or onednn forces one; a resumed training run uses the implementations
that its checkpoint names.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES, cpu_isa
from gptfast.machine import has_amx

IMPLEMENTATIONS = ("own", "torch", "onednn")
MIN_ROWS = 16  # below, packing the second factor costs more than the product


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    accumulate: bool = False,
    a_sums: Tensor | None = None,
    of_groups: bool = False,
) -> None:
    """out = a b (+ bias) (+ out).

    Args:
        a: (M, K), and b: (K, N), contiguous along rows or columns.
        out: (M, N), rows contiguous; any float dtype.
        dtype: a and b are rounded to it before they are multiplied; sums are fp32.
        bias: (N,) or None.
        accumulate: add the product to `out`.
        a_sums: (M,) float32 or None; receives the sums of a's rows. a must be contiguous along its columns.
        of_groups: this is one of the products of many groups of rows, for which the rule differs.
    """
    a, b = _dense(a), _dense(b)
    name = implementation_for(a, b, dtype, of_groups)
    if name == "own":
        return torch.ops.gptfast.gemm(a, b, bias, out, dtype == torch.bfloat16, accumulate, a_sums)
    _LIBRARY[name](a, b, out, bias, dtype, accumulate)
    if a_sums is not None:
        column_sums(a.t(), a_sums)


def column_sums(x: Tensor, out: Tensor) -> None:
    """out = the sums of the columns of x, in fp32.

    torch makes a float32 copy of 16 bits first: 14 ms for 4096 x 3072 of bfloat16 on two threads of a Xeon, where our product with one
    column, which sums on the way, takes 2.

    Args:
        x: (M, N), rows contiguous.
        out: (N,) float32.
    """
    own = (
        x.dtype in _HALF and x.device.type == "cpu" and x.numel() and may_be_own() and cpu_isa() not in (None, "scalar")
    )
    if not own:
        torch.sum(x, 0, dtype=torch.float32, out=out)
        return
    unread = x.new_empty(x.shape[1], 1)
    torch.ops.gptfast.gemm(x.t(), x[:, :1], None, unread, x.dtype == torch.bfloat16, False, out)


def grouped_gemm(
    a: Tensor, offsets: Tensor, b: Tensor, out: Tensor, *, dtype: torch.dtype, bias: Tensor | None = None
) -> None:
    """out = a b[g] (+ bias[g]) in the rows of each group g, from offsets[g] to offsets[g + 1].

    Where our kernels multiply, all groups are one call, and a group of fewer than 16 rows reads a matrix by columns once where it
    lies: also where a library multiplies larger groups, unless GPTFAST_GEMM names it. Else each group is one `gemm`.

    Args:
        a: (M, K); offsets: (G + 1,) int64 on the CPU, contiguous, rising from 0 to M; b: (G, K, N), matrices contiguous along
            rows or columns.
        out, dtype: as in `gemm`.
        bias: (G, N) or None.
    """
    own = _own_rows(a, b, dtype)
    if own:
        rows = a if a.stride(1) == 1 else a.contiguous()
        matrices = b if 1 in b.stride()[1:] else b.contiguous()
        pairs = dtype == torch.bfloat16
        torch.ops.gptfast.grouped_gemm(rows, offsets, matrices, bias, out, pairs, own[0], own[-1])
        if own[0] == 1 and len(a) <= own[-1]:
            return
    for g, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first < last and last - first not in own:
            added = None if bias is None else bias[g]
            gemm(a[first:last], b[g], out[first:last], dtype=dtype, bias=added, of_groups=True)


def _own_rows(a: Tensor, b: Tensor, dtype: torch.dtype) -> range:
    """The numbers of rows of a group that our kernels multiply."""
    if dtype not in KERNEL_DTYPES or a.device.type != "cpu" or not may_be_own() or not (a.numel() and b.numel()):
        return range(0)
    name = _name(_GROUPS[dtype])
    as_it_lies = b.stride(1) == 1 and cpu_isa() not in (None, "scalar")
    return range(1 if as_it_lies or _FORCED else MIN_ROWS, sys.maxsize if name == "own" else MIN_ROWS)


def implementation_for(a: Tensor, b: Tensor, dtype: torch.dtype, of_groups: bool = False) -> str:
    """The implementation that `gemm` uses for this product."""
    if dtype not in KERNEL_DTYPES or a.device.type != "cpu" or not (a.numel() and b.numel()):
        return "torch"
    if not _FORCED and a.shape[0] < MIN_ROWS:
        return "torch"
    name = _name(_GROUPS[dtype] if of_groups else _LAYOUTS[a.stride(1) != 1, b.stride(1) != 1, dtype])
    if name == "onednn" and not _onednn_multiplies(dtype):
        return "torch"
    # with AMX, oneDNN 3.x writes past its scratch memory in 200 x 1 by 1 x 31 of bfloat16
    return "torch" if name == "onednn" and min(*a.shape, b.shape[1]) < MIN_ROWS else name


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in `dtype` on this CPU: those of 16 bits need AVX-512."""
    if dtype == torch.float32:
        return True
    half = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported")())


def default_for(dtype: torch.dtype, of_groups: bool = False) -> str:
    """The rule: the implementation of products in `dtype` on this CPU."""
    if dtype == torch.bfloat16 and has_amx() and not (of_groups and cpu_isa() == "amx"):
        return "torch"
    return "torch" if cpu_isa() in (None, "scalar") else "own"


def implementations_of(dtype: str) -> dict[str, str]:
    """The implementations in use for products in `dtype`, such as "float32": by layout of the factors, or "groups", and dtype."""
    products = (*_LAYOUTS.values(), *_GROUPS.values())
    return {product: _name(product) for product in products if product.endswith(" " + dtype)}


def _name(product: str) -> str:
    layout, _, dtype = product.partition(" ")
    return _FORCED or _local.kept.get(product) or default_for(getattr(torch, dtype), layout == "groups")


def check_implementations(choices: Mapping[str, str]) -> None:
    """Raise ValueError for what `implementations_of` does not return."""
    for layout, name in choices.items():
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"gemm: implementation of {layout} is {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}"
            )


@contextmanager
def use_implementations(choices: Mapping[str, str]) -> Iterator[None]:
    """Use the implementations of another process, its `implementations_of`, inside the `with` and in this thread.

    Other layouts follow the rule. GPTFAST_GEMM overrides both.

    Raises:
        ValueError: unknown implementation.
    """
    check_implementations(choices)
    before, _local.kept = _local.kept, dict(choices)
    try:
        yield
    finally:
        _local.kept = before


def may_be_own() -> bool:
    """Whether GPTFAST_GEMM leaves products to our kernels."""
    return _FORCED in ("", "own")


def is_forced() -> bool:
    """Whether GPTFAST_GEMM names the implementation."""
    return bool(_FORCED)


def _check_forced(name: str) -> str:
    if name and name not in IMPLEMENTATIONS:
        raise ValueError(f"GPTFAST_GEMM is {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}, or unset")
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
_GROUPS = {dtype: f"groups {str(dtype)[6:]}" for dtype in KERNEL_DTYPES}
_HALF = (torch.bfloat16, torch.float16)
_LARGE = 1 << 28  # multiply-adds from which on two or three calls cost a GPU less than one: 8 rows by 50,257 of 768
_FORCED = _check_forced(os.environ.get("GPTFAST_GEMM", ""))


def _dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy if neither its rows nor its columns are contiguous."""
    return x if x.stride(1) == 1 or x.stride(0) == 1 else x.contiguous()


def _torch(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, dtype: torch.dtype, accumulate: bool) -> None:
    a, b = a.to(dtype), b.to(dtype)
    if out.is_cuda and dtype in _HALF and bias is None and a.numel() * b.shape[1] >= _LARGE:
        return _in_eights(a, b, out, accumulate)
    return _product(a, b, out, bias, accumulate)


def _in_eights(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = a b (+ out), with sides of whole eights in the large product, and what is beyond in small ones.

    Where a row of a factor or of the result ends within 16 bytes, as one of 50,257 values does, cuBLAS reads them one by one:
    its kernels for that ran at 95 to 125 TFLOP/s on an H200, those for whole eights at 485 and more."""
    (M, K), N = a.shape, b.shape[1]
    m = M if a.stride(1) == 1 else M - M % 8
    k = K - K % 8 if a.stride(1) == 1 or b.stride(0) == 1 else K
    n = N - N % 8
    if k < K:  # first, as the large product then rounds the sum
        _product(a[:, k:], b[k:], out, None, accumulate)
        accumulate = True
    for rows in (slice(0, m), slice(m, M)):
        for columns in (slice(0, n), slice(n, N)):
            part = out[rows, columns]
            if part.numel() and k:
                _product(a[rows, :k], b[:k, columns], part, None, accumulate)


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool) -> None:
    dtype = a.dtype
    if out.dtype == torch.float32 and dtype in _HALF and out.is_cuda and bias is None:
        # cuBLAS accumulates into a float32 result; torch offers that on CUDA only
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif out.dtype != dtype or (accumulate and bias is not None):
        product = a @ b if bias is None else torch.addmm(bias.to(dtype), a, b)
        out.add_(product) if accumulate else out.copy_(product)
    elif bias is not None:
        torch.addmm(bias.to(dtype), a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def _onednn(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, dtype: torch.dtype, accumulate: bool) -> None:
    bias = None if bias is None else bias.to(dtype).contiguous()  # the operator ignores its stride
    product = torch.ops.mkldnn._linear_pointwise(a.to(dtype), b.t().to(dtype), bias, "none", [], "")
    out.add_(product) if accumulate else out.copy_(product)


_LIBRARY: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype, bool], None]] = {
    "torch": _torch,
    "onednn": _onednn,
}
