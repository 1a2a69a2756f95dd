"""Matrix products, each by the way that a short measurement found fastest on this CPU; elsewhere torch's.

    own      csrc/cpu/gemm-inl.h: a row of the result depends on no other row and not on the number of threads; takes
             weights of another dtype as they are
    torch    torch.mm (MKL, OpenBLAS, oneDNN for bfloat16)
    onednn   oneDNN's linear, which torch uses for bfloat16 only

`own` is taken unless another way is ahead by more than LEAD, so that noise does not change the choice, and with it the
last bits of a run; a training checkpoint keeps the choices for its resumption. GPTFAST_GEMM=own, torch or onednn forces
one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES

METHODS = ("own", "torch", "onednn")
LEAD = 1.5
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
    if _FORCED:
        return _FORCED
    if a.shape[0] < FEW_ROWS:
        return "torch"
    layout = _LAYOUTS[a.stride(1) != 1, b.stride(1) != 1, dtype]
    if layout not in _chosen:
        _chosen[layout] = _fastest(layout[0] == "t", layout[1] == "t", dtype)
    return _chosen[layout]


def chosen_methods() -> dict[str, str]:
    """What was measured so far: layout of the factors and dtype, such as "nt float32", to method."""
    return dict(_chosen)


def keep_methods(chosen: dict[str, str]) -> None:
    """Go on with the choices of another process, for equal bits.

    Raises:
        ValueError: unknown method.
    """
    for layout, name in chosen.items():
        if name not in METHODS:
            raise ValueError(f"gemm: method of {layout} is {name!r}; expected one of {', '.join(METHODS)}")
    _chosen.update(chosen)


def forced() -> bool:
    """Whether GPTFAST_GEMM names the way."""
    return bool(_FORCED)


def _check_forced(name: str) -> str:
    if name and name not in METHODS:
        raise ValueError(f"GPTFAST_GEMM is {name!r}; expected one of {', '.join(METHODS)}, or unset to measure")
    return name


_LAYOUTS = {  # is a stored by columns, is b, dtype
    (a, b, dtype): f"{'nt'[a]}{'nt'[b]} {str(dtype)[6:]}"
    for a in (False, True)
    for b in (False, True)
    for dtype in KERNEL_DTYPES
}
_chosen: dict[str, str] = {}
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


def _fastest(a_by_columns: bool, b_by_columns: bool, dtype: torch.dtype) -> str:
    """The best on a product of GPT-2's width, in turns: some 50 ms."""
    # of values that do not matter, and that leave torch's generator as it is
    a, b = (torch.linspace(-1, 1, 768**2, dtype=torch.float32, device="cpu").view(768, 768).to(dtype) for _ in "ab")
    a, b = a.t() if a_by_columns else a, b.t() if b_by_columns else b
    out = torch.empty(768, 768, dtype=dtype, device="cpu")
    runners = {"own": lambda: torch.ops.gptfast.gemm(a, b, None, out, dtype == torch.bfloat16, False, None)}
    libraries = _LIBRARY if dtype != torch.float16 and torch.backends.mkldnn.is_available() else ("torch",)
    for name in libraries:
        runners[name] = lambda run=_LIBRARY[name]: run(a, b, out, None, dtype, False)
    times = _best_times(runners)
    best = min(times, key=times.__getitem__)
    return best if times[best] * LEAD < times["own"] else "own"


def _best_times(runners: dict[str, Callable[[], None]], rounds: int = 5) -> dict[str, float]:
    """Seconds of the fastest of so many turns, after one to warm up."""
    times = dict.fromkeys(runners, float("inf"))
    for n in range(rounds + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            if n:
                times[name] = min(times[name], time.perf_counter() - start)
    return times
