"""Benchmarks of gptfast and its peers: the machine's limits, interleaved comparisons, and the report."""

from gptfast.benchmarking.busy import busy_loops
from gptfast.benchmarking.compare import Comparison, compare, comparisons, count_comparisons
from gptfast.benchmarking.report import print_table, save_json, save_plot
from gptfast.machine import Machine, measure_machine

__all__ = [
    "Comparison",
    "Machine",
    "busy_loops",
    "compare",
    "comparisons",
    "count_comparisons",
    "measure_machine",
    "print_table",
    "save_json",
    "save_plot",
]
