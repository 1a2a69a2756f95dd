"""`make bench-gpu`: the CUDA kernels beside PyTorch's own on the GPU at hand; tables, and benchmarks/results/<gpu>.jsonl.

Every comparison is made in turns within one run, with cold caches; a figure is the median over the rounds. A comparison
that is lost is printed like one that is won. Each row is written when it is measured, with commit, date, GPU, driver and
clock; before the rows of a part comes its plan, so that a run that is cut off shows what is missing.

    python benchmarks/bench_gpu.py --try     runs the same code on the emulator with tiny shapes: no figure means anything
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import attention, ceilings, decode, family, memory_bound, packed, training, tuning
from gpu.provenance import provenance
from gpu.timing import Bench, Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


class Part(NamedTuple):
    plan: Callable[[Bench], list[str]]  # what the rows will be of
    measure: Callable[[Bench], Iterator[Row]]


# The ceilings come first in every call: other rows are in percent of them.
PARTS = {
    name: Part(module.plan, module.measure)
    for name, module in {
        "ceilings": ceilings,
        "memory": memory_bound,
        "packed": packed,
        "family": family,
        "attention": attention,
        "decode": decode,
        "training": training,
        "tuning": tuning,
    }.items()
}


def emulator() -> Bench:
    sys.path.insert(0, str(ROOT))
    from tests.support import emulated

    emulated.load()
    return Bench(device="cpu", backend="emu", tiny=True)


def file_name(gpu: str) -> str:
    return re.sub(r"\W+", "-", gpu.lower()).strip("-") + ".jsonl"


class Rows:
    """A file of rows, one JSON object a line, each on the disk before the next is measured."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, row: Row) -> None:
        if self.path is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"part": part, **row, **self.head}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_part(name: str, bench: Bench, rows: Rows) -> list[str]:
    """Measure a part; returns what failed of it."""
    part, failed, left = PARTS[name], [], PARTS[name].plan(bench)
    rows.add(name, {"plan": list(left)})
    try:
        for row in part.measure(bench):
            rows.add(name, row)
            left.remove(row["what"])
            if "gptfast" in row.get("refused", {}):
                failed.append(row["what"])
    except Exception:  # the other parts are of use without it
        traceback.print_exc()
        failed.append(name)
    if left:
        print(f"{name}: not measured: {', '.join(left)}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--try", action="store_true", dest="trial", help="on the emulator, with tiny shapes")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts only, and the ceilings")
    parser.add_argument(
        "--no-triton", action="store_true", help="leave our Triton kernels out, which take time to compile"
    )
    parser.add_argument("--out", type=Path, help="the file of rows, to which is appended")
    options = parser.parse_args()
    if not options.trial and not torch.cuda.is_available():
        print("bench-gpu: torch sees no NVIDIA GPU, so there is nothing to measure; no figure was written")
        return 2
    bench = emulator() if options.trial else Bench()
    bench.triton = not options.no_triton
    head = {**provenance(), "tiny": bench.tiny}
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    path = options.out or (None if options.trial else RESULTS / file_name(head["gpu"]))
    rows = Rows(path, head)
    failed: list[str] = []
    for name in dict.fromkeys(["ceilings", *(options.only or PARTS)]):
        failed += run_part(name, bench, rows)
    if path is not None:
        print(f"\nwritten to {path}")
    if failed:
        print(f"bench-gpu: FAILED: {', '.join(failed)} (above)")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
