"""quantized_linear (NF4) beside bitsandbytes, and beside the unquantised `ops.linear`, in turns in one run.

Run: python benchmarks/bench_quantized_linear.py [--shapes 768x3072 1600x6400] [--rows 1 2048] [--rounds 9]. It prints a JSON line
for each shape and number of rows, with the processor time of one thread in ms, which other work on the machine moves less than
the clock, and ratios, each the median of the ratios of the rounds: over_bitsandbytes is its time, in the faster of its forms, over
ours, with _double where our scales are doubly quantised; of_linear is our time over that of `ops.linear`. Floors: the read of the codes (1 row), 2 M N K flops (2048 rows). Needs
bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import functional, nn

from gptfast import ops

SHAPES, ROWS = ("768x3072", "3072x768", "1600x6400"), (1, 2048)


def race(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """ms of each call, by rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats):
                call()
            if n:
                times[name].append((time.thread_time() - start) / repeats * 1e3)
    return times


def calls(K: int, N: int, M: int) -> dict[str, Callable[[], object]]:
    weight, x, dy = torch.randn(N, K) * 0.02, torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    codes, scales = ops.quantize_nf4(weight).rows(N)
    double = ops.quantize_nf4(weight, double=True)
    bytes_, nested, offset = double.absmax.view_as(scales), double.nested_absmax, double.offset
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    layer = nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    layer.weight = nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    layer.eval()
    half = weight.bfloat16()
    found: dict[str, Callable[[], object]] = {
        "quantized_linear": lambda: ops.quantized_linear(x, codes, scales, format="nf4", group_size=64),
        "quantized_linear double": lambda: ops.quantized_linear(
            x, codes, bytes_, format="nf4", group_size=64, nested_absmax=nested, offset=offset
        ),
        "dequantize_4bit + F.linear": lambda: F.linear(x, functional.dequantize_4bit(theirs, state).bfloat16()),
        "linear": lambda: ops.linear(x, half),
        "quantized_linear dx": lambda: torch.ops.gptfast.quantized_linear_bwd(dy, codes, scales, "nf4", 64, K),
        "dequantize_4bit dx": lambda: dy @ functional.dequantize_4bit(theirs, state).bfloat16(),
        "linear dx": lambda: torch.ops.gptfast.linear_bwd(dy, x, half, True, False, False),
    }
    return found | {"Linear4bit": lambda: layer(x)}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians of the ratios of each round, of y = x W^T and of dx = dy W."""

    def median(a: list[float], b: list[float]) -> float:
        return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 2)

    found: dict[str, float] = {}
    for what in ("", " dx"):
        theirs = [times[f"dequantize_4bit{what or ' + F.linear'}"], *([times["Linear4bit"]] if not what else ())]
        ours, key = times[f"quantized_linear{what}"], what.replace(" ", "_")
        found[f"over_bitsandbytes{key}"] = median(min(theirs, key=statistics.median), ours)
        if not what:
            found["over_bitsandbytes_double"] = median(
                min(theirs, key=statistics.median), times["quantized_linear double"]
            )
        found[f"of_linear{key}"] = median(ours, times[f"linear{what}"])
    return found


def measure(shapes: Iterable[str] = SHAPES, rows: Iterable[int] = ROWS, rounds: int = 9) -> Iterator[dict[str, Any]]:
    """A result for each shape, "KxN", and number of rows; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for K, N in (map(int, shape.split("x")) for shape in shapes):
                for M in rows:
                    times = race(calls(K, N, M), rounds, 30 if M < 16 else 1)
                    ms = {name: round(statistics.median(ts), 4) for name, ts in times.items()}
                    yield {"K": K, "N": N, "rows": M, **ratios(times), "ms": ms}
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for result in measure(options.shapes, options.rows, options.rounds):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
