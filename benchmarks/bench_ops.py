"""pytest-benchmark over the shared case table: each op beside eager PyTorch and torch's own functions.

    pytest benchmarks/bench_ops.py [-k gelu]

The peers run in the set-up of every round, outside the timed region but between two timed calls, so that all take
turns on a drifting machine; their medians and the ratios stand in `extra_info`.
"""

from __future__ import annotations

import time

import pytest
import torch

from gptfast.benchmarking.compare import Comparison, make_comparison, record
from gptfast.benchmarking.report import percent_of_limit
from gptfast.testing import SPECS, bench_cases, cases, check_case

ROUNDS = 5
PARAMETERS = [
    pytest.param(case, dtype, backward, id=f"{op}-{case.id}-{name}-{'fwd+bwd' if backward else 'fwd'}")
    for op, spec in SPECS.items()
    for case in bench_cases(op)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for backward in ((False, True) if spec.has_backward else (False,))
]


@pytest.mark.parametrize(("case", "dtype", "backward"), PARAMETERS)
def test_op(case, dtype, backward, benchmark, machine, record_result):
    for small in cases(case.op)[:3]:
        check_case(small, dtype)
    c = make_comparison(case, dtype, backward)
    times: dict[str, list[float]] = {name: [] for name in ("ours", *c.peers)}

    def peers_take_their_turn():
        for name, fn in c.peers.items():
            start = time.perf_counter()
            fn()
            times[name].append((time.perf_counter() - start) * 1e3)

    benchmark.pedantic(c.ours, setup=peers_take_their_turn, rounds=ROUNDS, warmup_rounds=1)
    times["ours"] = [t * 1e3 for t in benchmark.stats.stats.data]
    record(c, {name: values[-ROUNDS:] for name, values in times.items()})
    _describe(benchmark, c, machine)
    record_result(c)


def _describe(benchmark, c: Comparison, machine) -> None:
    flops, data = c.case.cost(torch.finfo(c.dtype).bits // 8)
    share, what = percent_of_limit(c, machine)
    benchmark.extra_info.update(
        machine.as_dict(), flops=flops, bytes=data, percent_of_limit=share, limit=what, speedup=c.ratios
    )
