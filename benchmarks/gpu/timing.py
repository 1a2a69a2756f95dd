"""Timing on a GPU: everything that is compared takes turns in one run."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
Row = dict[str, Any]
# What a backend says of a call that it does not take, or has no memory for.
Refused = (RuntimeError, NotImplementedError, ValueError, TypeError)
SUSTAINED_S = 1.0


@dataclass
class Bench:
    """Where to measure: a GPU, or, to try the code, the CPU with tiny shapes, whose times mean nothing.

    triton: our Triton kernels take turns too; each is compiled, and its tiles are chosen, when it first runs.
    spread: of the last `milliseconds`, the quartiles of each and the clock.
    """

    device: str = "cuda"
    backend: str = "cuda"
    tiny: bool = False
    triton: bool = True
    spread: Row = field(default_factory=dict)
    ceilings: Row = field(default_factory=dict)

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
        rounds, warmup = (2, 1) if self.tiny else (rounds, warmup)
        for run in runs.values():
            for _ in range(warmup):
                run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        larger_than_l2 = torch.zeros(1 << (10 if self.tiny else 26), device=self.device)
        for _ in range(rounds):
            for name, run in runs.items():
                larger_than_l2.sum()  # read, not written: what lies in the cache then need not be written back first
                times[name].append(self._milliseconds(run))
        quartiles = {name: statistics.quantiles(t, n=4)[::2] for name, t in times.items()}
        self.spread = {"quartiles": quartiles, **self.clock()}
        return {name: statistics.median(t) for name, t in times.items()}

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def _milliseconds(self, run: Run, times: int = 1) -> float:
        if not self.real:
            start = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # a millisecond in which Python gets ahead: what is timed is the GPU
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def sustained(self, run: Run, milliseconds: float) -> Row:
        """Milliseconds of one run in a second of them back to back, and the clock at the end: chips that wait between
        runs stay cool and clock higher."""
        count = 2 if self.tiny else max(1, int(SUSTAINED_S * 1e3 / milliseconds))
        return {"sustained ms": self._milliseconds(run, count) / count, "sustained": self.clock()}

    def clock(self) -> Row:
        """Of the multiprocessors, and the power: nvidia-smi is only asked."""
        return query("clocks.sm", "power.draw") if self.real else {}


def query(*names: str) -> Row:
    """What nvidia-smi says of the current GPU; nothing where it does not run."""
    command = ["nvidia-smi", f"--id={torch.cuda.current_device()}", f"--query-gpu={','.join(names)}"]
    try:
        said = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (value.strip() for value in said.stdout.splitlines()[0].split(",")), strict=False))


def with_gradients(f: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Run:
    """Forward and backward of f against fixed upstream gradients, one for each of its results."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    results = f(*leaves)
    upstream = [torch.randn_like(y) for y in ((results,) if isinstance(results, Tensor) else results)]
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
