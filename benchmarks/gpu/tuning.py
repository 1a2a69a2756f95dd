"""How long our Triton kernels take before their first result: compiling, and trying tiles once for each GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from gptfast import ops
from gptfast.triton import unavailable_reason

from .timing import Bench, Refused, Row

SETTING = "GPTFAST_TRITON_TUNE"


def calls(bench: Bench) -> dict[str, Callable[[], Any]]:
    T = bench.size(1024, 32)
    x, w = bench.randn(T, 64), bench.randn(64)
    q = bench.randn(1, 2, T, 64).requires_grad_()
    weight = ops.quantize_groups(bench.randn(64, 64), "int4")
    return {
        "layer_norm": lambda: ops.layer_norm(x, w, backend="triton"),
        "gelu": lambda: ops.gelu(x, approximate="tanh", backend="triton"),
        "causal_attention": lambda: ops.causal_attention(q.detach(), q.detach(), q.detach(), backend="triton"),
        "causal_attention fwd+bwd": lambda: ops.causal_attention(q, q, q, backend="triton").sum().backward(),
        "quantized_linear": lambda: ops.quantized_linear(x, *weight, format="int4", backend="triton"),
    }


def plan(bench: Bench) -> list[str]:
    return [f"{name}, {how}" for name in calls(bench) for how in ("untuned", "tuned")]


def measure(bench: Bench) -> Iterator[Row]:
    before = os.environ.get(SETTING)
    print(f"\n{'seconds before the first result, Triton':44}")
    try:
        for name, call in calls(bench).items():
            for how, value in (("untuned", "0"), ("tuned", "1")):
                os.environ[SETTING] = value
                start, refused = time.perf_counter(), {}
                try:
                    call()
                    bench.wait()
                except Refused as error:
                    refused = {"triton": unavailable_reason(None) or str(error).splitlines()[0]}
                seconds = time.perf_counter() - start
                print(f"{f'{name}, {how}':44}{seconds:>8.1f}{'  refused' if refused else ''}", flush=True)
                yield {"what": f"{name}, {how}", "seconds": seconds, "refused": refused}
    finally:
        os.environ.pop(SETTING, None)
        if before is not None:
            os.environ[SETTING] = before
