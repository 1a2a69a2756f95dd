"""Products by weights of 8 and 4 bits: beside the weight in bfloat16, beside decoding it for each product, and beside bitsandbytes
where that is installed. Few rows: GB/s of codes and scales, which are read once. Many: TFLOP/s."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gptfast import ops
from gptfast._nf4 import dequantize_groups

from .peers import Makers, backends
from .timing import Bench, Row, Run, that_run

FORMATS = {"int8": 32, "int4": 32, "nf4": 64, "mxfp4": 32}
ROWS = (1, 8, 32, 256, 2048)
PEERS = ("torch", "decoded", "triton", "bitsandbytes")


def rows_of(bench: Bench) -> tuple[int, ...]:
    return (1, 33) if bench.tiny else ROWS


def name_of(format: str, rows: int, gradient: bool = False) -> str:
    return f"quantized_linear {format}, {rows} row{'s' * (rows > 1)}{' dx' * gradient}"


def plan(bench: Bench) -> list[str]:
    rows = rows_of(bench)
    return [name_of(f, n, g) for f in FORMATS for n, g in [*((n, False) for n in rows), (rows[-1], True)]]


def bitsandbytes(weight: Tensor, x: Tensor) -> Makers:
    """Its product by the same weight in NF4, where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None or x.device.type != "cuda":
        return {}

    def maker() -> Run:
        from bitsandbytes.autograd._functions import matmul_4bit
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return lambda: matmul_4bit(x, codes.t(), quant_state=state)

    return {"bitsandbytes": maker}


def codes_of(weight: Tensor, format: str, size: int) -> tuple[Tensor, Tensor]:
    if format == "nf4":
        return ops.quantize_nf4(weight, block_size=size).rows(len(weight))
    return ops.quantize_mxfp4(weight) if format == "mxfp4" else ops.quantize_groups(weight, format, group_size=size)


def makers_of(
    bench: Bench, weight: Tensor, packed: tuple[Tensor, Tensor], format: str, rows: int, back: bool
) -> Makers:
    N, K = weight.shape
    size = FORMATS[format]
    x = bench.randn(rows, N if back else K)

    def own(name: str) -> Run:
        if not back:
            return lambda: ops.quantized_linear(x, *packed, format=format, group_size=size, backend=name)
        from gptfast.ops.quantized_linear import backward_product

        return lambda: backward_product(name, x, *packed, format, size, K)

    def product(w: Tensor) -> Tensor:
        return x @ w if back else F.linear(x, w)

    others: dict[str, Callable[[], Any]] = {
        "torch": lambda: lambda: product(weight),
        "decoded": lambda: lambda: product(dequantize_groups(*packed, format, size).to(x.dtype)),
    }
    theirs = bitsandbytes(weight, x) if format == "nf4" and not back else {}
    return {**backends(bench, own), **others, **theirs}


def measure(bench: Bench) -> Iterator[Row]:
    K, N = bench.size(4096, 64), bench.size(16384, 64)
    weight = bench.randn(N, K)
    print(
        f"\n{f'{N} x {K}, bfloat16':44}{'ms':>8}{'GB/s':>8}{'TFLOP/s':>9}" + "".join(f"{f'{n} /':>15}" for n in PEERS)
    )
    for format, size in FORMATS.items():
        packed = codes_of(weight, format, size)
        least = sum(t.numel() * t.element_size() for t in packed)
        for rows, back in [*((n, False) for n in rows_of(bench)), (rows_of(bench)[-1], True)]:
            runs, refused = that_run(makers_of(bench, weight, packed, format, rows, back).items())
            times, what = bench.milliseconds(runs), name_of(format, rows, back)
            speeds = {n: least / t / 1e6 for n, t in times.items()}
            flops = {n: 2 * rows * N * K / t / 1e9 for n, t in times.items()}
            yield {"what": what, "ms": times, "GB/s": speeds, "TFLOP/s": flops, "refused": refused, **bench.spread}
            own = times.get("gptfast")
            if own is None:
                print(f"{what:44}{refused['gptfast']}")
                continue
            ratios = "".join(f"{f'{times[n] / own:.2f}x' if n in times else '-':>15}" for n in PEERS)
            print(f"{what:44}{own:>8.3f}{speeds['gptfast']:>8,.0f}{flops['gptfast']:>9.1f}{ratios}", flush=True)
