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
_DTYPES = (torch.float32, torch.bfloat16)
_SECONDS = 4.0  # of the rounds of a case
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
    once: list[str] = field(default_factory=list)  # peers that were called once: a call took longer than all rounds may

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
    upstream: list[torch.Tensor] = []  # made in the first call, which warms up: a call may take seconds

    def both() -> Any:
        out = fn(*args, **case.options)
        first = out[0] if isinstance(out, tuple) else out
        if not upstream:
            upstream.append(torch.ones_like(first))
        return torch.autograd.grad(first, wanted, upstream[0], allow_unused=True)

    return both


def count_comparisons(op_names: list[str] | None = None) -> int:
    """How many `comparisons` yields."""
    return sum(len(_DTYPES) * len(bench_cases(op)) * len(_modes(op)) for op in op_names or list(CASES))


def _modes(op: str) -> tuple[bool, ...]:
    """Whether there is a backward pass, for each way in which an op is timed."""
    return (False, True) if SPECS[op].has_backward else (False,)


def comparisons(op_names: list[str] | None = None, dtypes: tuple[torch.dtype, ...] = _DTYPES):
    """Yield a ready Comparison for every benchmark case: parity is checked on the small cases of the op first."""
    for op in op_names or list(CASES):
        for dtype in dtypes:
            checked = [check_case(case, dtype) for case in cases(op)]
            errors = max(e[0] for e in checked), max(e[1] for e in checked)
            for case in bench_cases(op):
                for backward in _modes(op):
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


def compare(c: Comparison, rounds: int = 7, seconds: float = _SECONDS) -> Comparison:
    """Measure times and ratios. All take turns, so that a drift of the machine affects all alike, in an order that changes
    from round to round, since eager PyTorch evicts the caches of its successor. A peer whose first call takes longer than
    `seconds`, at least four, is not called again: that call is its time. Some of bfloat16 do where the CPU emulates it.

    Args:
        rounds: most rounds after one warm-up round.
        seconds: stop after three rounds or more when this much time has passed.
    """
    runners = {"ours": c.ours, **c.peers}
    first = {name: _timed(fn) for name, fn in runners.items()}
    c.once = [name for name in c.peers if first[name] > 1e3 * max(seconds, _SECONDS)]
    runners = {name: fn for name, fn in runners.items() if name not in c.once}
    times: dict[str, list[float]] = {name: [] for name in runners}
    start = time.perf_counter()
    for n in range(rounds):
        for name in random.Random(n).sample(list(runners), len(runners)):
            times[name].append(_timed(runners[name]))
        if n >= 2 and time.perf_counter() - start > seconds:
            break
    record(c, times | {name: [first[name]] for name in c.once})
    return c


def record(c: Comparison, times: dict[str, list[float]]) -> None:
    """Medians of the times, and of the ratios round by round, into `c`; of a peer that was called once its time over our median."""
    c.milliseconds = {name: statistics.median(values) for name, values in times.items()}
    ours = times["ours"]
    for name, values in times.items():
        if name != "ours":
            mine = [c.milliseconds["ours"]] if name in c.once else ours
            c.ratios[name] = statistics.median(t / o for t, o in zip(values, mine, strict=True))
