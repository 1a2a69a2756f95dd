"""Our ops and their peers on the case table: A B A B in one run, medians of the ratios, after a check of correctness."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import CASES, SPECS, Case, bench_cases, cases, check_case

Fn = Callable[..., Any]
COPY = "copy of its bytes"  # not a peer: the floor of an op that is bound by memory


@dataclass
class Comparison:
    """One case in one dtype and mode, ours and the peers as closures that take no arguments."""

    case: Case
    dtype: torch.dtype
    backward: bool
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    errors: tuple[float, float] = (0.0, 0.0)  # of results and gradients, as multiples of eager PyTorch's; small cases
    milliseconds: dict[str, float] = field(default_factory=dict)  # medians; "ours" first
    ratios: dict[str, float] = field(default_factory=dict)  # peer / ours, median over the rounds

    @property
    def name(self) -> str:
        mode = "fwd+bwd" if self.backward else "fwd"
        return f"{self.case.op} {self.case.id} {str(self.dtype)[6:]} {mode}"


def _closure(fn: Fn, case: Case, dtype: torch.dtype, backward: bool) -> Callable[[], Any]:
    """A call of fn on inputs made now; with backward, gradients of its first result too."""
    args = [a.requires_grad_(backward) if a is not None and a.is_floating_point() else a for a in case.inputs(dtype)]
    wanted = [a for a in args if a is not None and a.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return fn(*args, **case.options)

    if not backward:
        return forward
    out = fn(*args, **case.options)
    first = out[0] if isinstance(out, tuple) else out
    upstream = torch.ones_like(first)

    def both() -> Any:
        out = fn(*args, **case.options)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, wanted, upstream, allow_unused=True)

    return both


def comparisons(op_names: list[str] | None = None, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)):
    """Yield a ready Comparison for every benchmark case: parity is checked on the small cases of the op first."""
    for op in op_names or list(CASES):
        for dtype in dtypes:
            checked = [check_case(case, dtype) for case in cases(op)]
            errors = max(e[0] for e in checked), max(e[1] for e in checked)
            for case in bench_cases(op):
                for backward in (False, True) if SPECS[op].has_backward else (False,):
                    comparison = make_comparison(case, dtype, backward)
                    comparison.errors = errors
                    yield comparison


def make_comparison(case: Case, dtype: torch.dtype, backward: bool) -> Comparison:
    peer = SPECS[case.op].peer
    if peer is None:
        raise ValueError(f"{case.op}: gptfast/testing/ops/{case.op}.py names no peer, which benchmarks need")
    peers = {peer[0]: _closure(peer[1], case, dtype, backward)}
    flops, data = case.cost(torch.finfo(dtype).bits // 8)
    if not flops and not backward:
        peers[COPY] = _copy(int(data))
    if not case.slow_reference:
        peers["eager"] = _closure(getattr(reference, case.op), case, dtype, backward)
    ours = _closure(getattr(ops, case.op), case, dtype, backward)
    return Comparison(case, dtype, backward, ours, peers)


def _copy(size: int) -> Callable[[], Any]:
    """A copy that reads and writes `size` bytes in all, between tensors that exist: the limit of a memory-bound op."""
    source, target = torch.zeros(2, size // 2, dtype=torch.uint8).unbind()
    return lambda: target.copy_(source)


def _timed(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def compare(c: Comparison, rounds: int = 7, seconds: float = 4.0) -> Comparison:
    """Measure times and ratios. All take turns, so that a drift of the machine affects all alike, in an order that changes
    from round to round, since eager PyTorch evicts the caches of its successor.

    Args:
        rounds: most rounds after one warm-up round.
        seconds: stop after three rounds or more when this much time has passed.
    """
    runners = {"ours": c.ours, **c.peers}
    for fn in runners.values():
        fn()
    times: dict[str, list[float]] = {name: [] for name in runners}
    start = time.perf_counter()
    for n in range(rounds):
        for name in random.Random(n).sample(list(runners), len(runners)):
            times[name].append(_timed(runners[name]))
        if n >= 2 and time.perf_counter() - start > seconds:
            break
    record(c, times)
    return c


def record(c: Comparison, times: dict[str, list[float]]) -> None:
    """Medians of the times, and of the ratios round by round, into `c`."""
    c.milliseconds = {name: statistics.median(values) for name, values in times.items()}
    ours = times["ours"]
    for name, values in times.items():
        if name != "ours":
            c.ratios[name] = statistics.median(t / o for t, o in zip(values, ours, strict=True))
