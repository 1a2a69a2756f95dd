"""quantized_linear (NF4) beside bitsandbytes, dequantise + F.linear, and the unquantised `ops.linear`, in turns in one run.

Run: python benchmarks/bench_quantized_linear.py [--shapes 768x3072 1600x6400] [--rows 1 2048] [--rounds 9]. It prints a JSON line
for each shape and number of rows: median processor time of one thread in ms, which other work on the machine moves less than
the clock. Floors: the read of the codes (1 row), 2 M N K flops (2048 rows). Needs bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bitsandbytes import functional, nn

from gptfast import ops


def race(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats):
                call()
            times[name].append((time.thread_time() - start) / repeats * 1e3)
    return {name: round(statistics.median(ts[1:]), 4) for name, ts in times.items()}


def calls(K: int, N: int, M: int) -> dict[str, Callable[[], object]]:
    weight, x, dy = torch.randn(N, K) * 0.02, torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    codes, scales = ops.quantize_nf4(weight).rows(N)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    layer.eval()
    half = weight.bfloat16()
    found: dict[str, Callable[[], object]] = {
        "gptfast": lambda: ops.quantized_linear(x, codes, scales, format="nf4", group_size=64),
        "dequantize_4bit + F.linear": lambda: F.linear(x, functional.dequantize_4bit(theirs, state).bfloat16()),
        "ops.linear bf16": lambda: ops.linear(x, half),
        "gptfast dx": lambda: torch.ops.gptfast.quantized_linear_bwd(dy, codes, scales, "nf4", 64, K),
        "dequantize_4bit dx": lambda: dy @ functional.dequantize_4bit(theirs, state).bfloat16(),
        "bf16 dx": lambda: dy @ half,
    }
    return found | ({"Linear4bit": lambda: layer(x)} if M == 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["768x3072", "3072x768", "1600x6400"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for K, N in (map(int, shape.split("x")) for shape in options.shapes):
            for M in options.rows:
                times = race(calls(K, N, M), options.rounds, 30 if M < 16 else 1)
                print(json.dumps({"K": K, "N": N, "rows": M, "ms": times}), flush=True)


if __name__ == "__main__":
    main()
