"""One table of cases for each op, shared by tests and benchmarks, and the accuracy rule that both hold results to."""

import gptfast.testing.ops  # noqa: F401 (fills the table)
from gptfast.testing.accuracy import assert_accurate
from gptfast.testing.case import DTYPES, SPECS, Case, Spec, bench_cases, cases, dtypes
from gptfast.testing.parity import Run, check_case, run

CASES: dict[str, list[Case]] = {op: spec.cases for op, spec in SPECS.items()}

__all__ = [
    "CASES",
    "DTYPES",
    "SPECS",
    "Case",
    "Run",
    "Spec",
    "assert_accurate",
    "bench_cases",
    "cases",
    "check_case",
    "dtypes",
    "run",
]
