"""Timing on a GPU: everything that is compared takes turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
# What a backend says of a call that it does not take, or has no memory for.
Refused = (RuntimeError, NotImplementedError, ValueError, TypeError)


@dataclass
class Bench:
    """Where to measure: a GPU, or, to try the code, the CPU with tiny shapes, whose times mean nothing."""

    device: str = "cuda"
    backend: str = "cuda"
    tiny: bool = False

    @property
    def real(self) -> bool:
        return self.device == "cuda"

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.tiny else real

    def sizes(self, real: tuple[int, ...], tiny: tuple[int, ...]) -> tuple[int, ...]:
        return tiny if self.tiny else real

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def milliseconds(self, runs: dict[str, Run], rounds: int = 15, warmup: int = 3) -> dict[str, float]:
        """Median time of each, in turns, each with cold caches."""
        rounds, warmup = (1, 1) if self.tiny else (rounds, warmup)
        for run in runs.values():
            for _ in range(warmup):
                run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        larger_than_l2 = torch.empty(1 << (10 if self.tiny else 28), dtype=torch.int8, device=self.device)
        for _ in range(rounds):
            for name, run in runs.items():
                larger_than_l2.zero_()
                times[name].append(self._milliseconds(run))
        return {name: statistics.median(t) for name, t in times.items()}

    def _milliseconds(self, run: Run) -> float:
        if not self.real:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # a millisecond in which Python gets ahead: what is timed is the GPU
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def with_gradients(f: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """Forward and backward of f against a fixed upstream gradient."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    upstream = torch.randn_like(f(*leaves))
    return lambda: torch.autograd.grad(f(*leaves), leaves, upstream)


def that_run(candidates: Iterable[tuple[str, Callable[[], Run]]]) -> tuple[dict[str, Run], dict[str, str]]:
    """Those that can be made and run once, and why the others cannot."""
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, make in candidates:
        try:
            run = make()
            run()
            runs[name] = run
        except Refused as error:
            refused[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return runs, refused
