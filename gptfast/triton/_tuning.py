"""Autotuning of tile sizes: a few candidates, timed once for each GPU and class of shapes, stored in a file.

The choice changes the last bits of results, so it is stored: in triton_tiles.json in GPTFAST_CACHE, or else in
~/.cache/gptfast. GPTFAST_TRITON_TUNE=0 always takes the first candidate, which is the same on every machine.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from gptfast._files import atomic_write, cache_folder
from gptfast.triton import INTERPRETING

Candidate = TypeVar("Candidate")
LIMIT_S = 30.0  # no further candidate is compiled once a choice has taken this long
ROUNDS = 10
ATTEMPTS = 3  # to measure twice in turn that the same candidate is the fastest
_chosen: dict[str, int] = {}


def fastest(
    kernel: str, shape_class: tuple[Any, ...], candidates: Sequence[Candidate], launch: Callable[[Candidate], None]
) -> Candidate:
    """The fastest candidate; the first one where nothing can be measured: in the interpreter, during the capture of a graph,
    or with one candidate.

    Args:
        kernel, shape_class: each pair of them is measured once on a GPU.
        candidates: the one that is expected to be the fastest comes first.
        launch: runs the kernel with a candidate; may run any number of times.
    """
    if len(candidates) == 1 or INTERPRETING or os.environ.get("GPTFAST_TRITON_TUNE", "1") == "0":
        return candidates[0]
    key = f"{torch.cuda.get_device_name()}, Triton {triton.__version__}, {kernel} {shape_class} of {candidates}"
    if key not in _chosen:
        _chosen.update((key, n) for n in [_kept().get(key, -1)] if 0 <= n < len(candidates))
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _chosen[key], agreed = _measure(kernel, candidates, launch)
        if agreed:
            _keep(key)
    return candidates[_chosen[key]]


def _measure(kernel: str, candidates: Sequence[Candidate], launch: Callable[[Candidate], None]) -> tuple[int, bool]:
    """Index of the fastest candidate, and whether two measurements in turn found the same: else the first candidate, for
    this process only. Reports the time on stderr. Candidates that fail are skipped: if all fail, the call itself raises the
    error."""
    start, times = time.perf_counter(), []
    for candidate in candidates:
        if times and time.perf_counter() - start > LIMIT_S:
            break
        times.append(_time(candidate, launch))
    best, agreed = times.index(min(times)), math.isinf(min(times)) or times.count(math.inf) == len(times) - 1
    for _ in range(0 if agreed else ATTEMPTS):
        times = [
            x if math.isinf(x) else _time(candidate, launch) for candidate, x in zip(candidates, times, strict=False)
        ]
        before, best = best, times.index(min(times))
        if agreed := best == before:
            break
    seconds = time.perf_counter() - start
    doubt = "" if agreed else "; the measurements disagree: the first one until this process ends"
    print(
        f"gptfast: {kernel}: tried {len(times)} tilings in {seconds:.1f} s, once for this GPU{doubt}", file=sys.stderr
    )
    return (best, True) if agreed else (0, False)


def _time(candidate: Candidate, launch: Callable[[Candidate], None]) -> float:
    try:
        return _milliseconds(lambda: launch(candidate))
    except (triton.runtime.errors.OutOfResources, RuntimeError):  # shared memory; Triton's compiler or driver
        return math.inf


def _milliseconds(run: Callable[[], None]) -> float:
    """The time of one run: the least of a few, after a run that compiles."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    torch.cuda._sleep(
        2_000_000
    )  # Python enqueues launches during this millisecond: else small kernels are timed by their launch
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return min(a.elapsed_time(b) for a, b in pairwise(events))


def _path() -> Path:
    return cache_folder() / "triton_tiles.json"


def _kept() -> dict[str, int]:
    try:
        kept = json.loads(_path().read_text())
    except (OSError, ValueError, RecursionError):  # missing or damaged: measured and written again
        return {}
    return {key: n for key, n in kept.items() if isinstance(n, int)} if isinstance(kept, dict) else {}


def _keep(key: str) -> None:
    with suppress(OSError):  # not writable: measured once a process
        atomic_write(_path(), json.dumps({**_kept(), key: _chosen[key]}, indent=1).encode())
