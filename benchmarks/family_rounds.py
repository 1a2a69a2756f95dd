"""Rounds of bench_family.py: kinds take turns, and a ratio is the median over the rounds."""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
Call = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPT_OSS = {"alpha": 1.702, "limit": 7.0, "layout": "interleaved"}


def turns(calls: dict[str, Call], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(options.rounds + 1):
        for name in random.Random(n).sample(list(calls), len(calls)):
            start = options.clock()
            calls[name]()
            if n:
                times[name].append(options.clock() - start)
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over the rounds of a's time over b's."""
    return round(statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)), 3)


def milliseconds(times: list[float]) -> float:
    return round(1e3 * statistics.median(times), 3)


def with_gradients(call: Call, wanted: list[Tensor]) -> Call:
    """Forward and backward, with a gradient of ones."""
    return lambda: torch.autograd.grad(call().sum(), wanted)
