"""What the GPU at hand reaches at most, measured in every call: a copy, and a large product in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .timing import Bench, Row


def plan(bench: Bench) -> list[str]:
    return ["copy", "matmul"]


def measure(bench: Bench) -> Iterator[Row]:
    """Also sets `bench.ceilings`: GB/s of the copy, read and written bytes together, and TFLOP/s of the product."""
    x = torch.empty(bench.size(1 << 28, 1 << 12), dtype=torch.float32, device=bench.device)
    y = torch.empty_like(x)
    times = bench.milliseconds({"copy": lambda: y.copy_(x)})
    bench.ceilings["GB/s"] = 2 * x.numel() * 4 / times["copy"] / 1e6
    yield {"what": "copy", "ms": times, "GB/s": bench.ceilings["GB/s"], **bench.spread}
    n = bench.size(8192, 32)
    a, b = bench.randn(n, n), bench.randn(n, n)
    times = bench.milliseconds({"matmul": lambda: a @ b}, rounds=7)
    bench.ceilings["TFLOP/s"] = 2 * n**3 / times["matmul"] / 1e9
    spread = bench.spread
    sustained = bench.sustained(lambda: a @ b, times["matmul"])
    yield {"what": "matmul", "n": n, "ms": times, "TFLOP/s": bench.ceilings["TFLOP/s"], **spread, **sustained}
    print(
        f"copy {bench.ceilings['GB/s']:,.0f} GB/s; matmul {bench.ceilings['TFLOP/s']:,.1f} TFLOP/s, bfloat16",
        flush=True,
    )
