"""Runs cases in processes that may crash: what a case finds, a signal that ends it, and one that does not end are findings.

A case is a function of its own random numbers, which are those of (seed, its number): it can be run again alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS = 60.0  # that a case may take on a busy machine
MAKING = 600.0  # that all of their preparation may take, which trains models
MOST = 20  # findings, then it is enough
LEAST = 10  # cases, however long they take: a busy machine must not make a campaign of nothing
MEMORY = 4 << 30  # bytes that a process may have beyond those at its start

Case = Callable[[random.Random], tuple[str, str | None]]  # the kind of case; what it found, or None


@dataclass
class Report:
    """What a campaign did. findings: one text each, with what runs the case again."""

    name: str
    seed: int
    tried: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    again: Counter[str] = field(default_factory=Counter)  # findings like one that is there already

    def add(self, number: int, text: str) -> None:
        """A finding of case `number`, unless there is one like it."""
        last = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "…", text.strip().splitlines()[-1])
        if not self.again[last]:
            again = f"python -m tests.fuzz {self.name} --seed {self.seed} --case {number}"
            self.findings.append(f"{text}\n    again: {again}")
        self.again[last] += 1


def campaign(name: str, make: Callable[[], Case], seconds: float, seed: int) -> Report:
    """Run cases for about so many seconds, and `LEAST` of them at least, beside what it takes to prepare them.

    Args:
        name: of the part, for reports.
        make: prepares the cases; called in every process that runs some.
        seconds, seed: see above.
    """
    report, number, end = Report(name, seed), 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gptfast-fuzz-") as place:
        while (time.monotonic() < end or number < LEAST) and len(report.findings) < MOST:
            number, making = _run_until_it_ends(report, make, number, end - time.monotonic(), place)
            end += making
    return report


def run_case(make: Callable[[], Case], seed: int, number: int) -> str | None:
    """One case in this process, to look at."""
    return make()(random.Random(f"{seed}:{number}"))[1]


def _run_until_it_ends(
    report: Report, make: Callable[[], Case], first: int, seconds: float, place: str
) -> tuple[int, float]:
    """Cases from number `first` on, in a child; returns the number of the next one, and how long their making took."""
    begin, making = time.monotonic(), 0.0
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        tempfile.tempdir = place
        _work(make, report.seed, first, seconds, writing)
    os.close(writing)
    number, rest, ended = first - 1, b"", False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            patience = SECONDS if number >= first else MAKING
            if not select.select([pipe], [], [], patience)[0]:
                os.kill(child, signal.SIGKILL)
                report.add(number, f"no end within {patience:.0f} s")
                break
            data = pipe.read(1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                number, ended = told.get("begins", number), "ended" in told
                making = making or time.monotonic() - begin
                if "kind" in told:
                    report.tried[told["kind"]] += 1
                    if told["found"] is not None:
                        report.add(number, told["found"])
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        report.add(number, f"signal {os.WTERMSIG(status)}")
    elif not ended and os.WIFEXITED(status):
        if number < first:
            raise RuntimeError(f"fuzz: {report.name}: the campaign cannot begin; its process ended with {status >> 8}")
        report.add(number, f"the process ended with {os.WEXITSTATUS(status)}")
    return number + 1, making


def _work(make: Callable[[], Case], seed: int, number: int, seconds: float, pipe: int) -> None:
    """In the child: cases one after the other, told to the parent as they come."""

    def tell(**what: object) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # tables and bars of what is called
        _limit_memory()
        case = make()
        end = time.monotonic() + seconds
        while time.monotonic() < end or number < LEAST:
            tell(begins=number)
            kind, found = case(random.Random(f"{seed}:{number}"))
            tell(kind=kind, found=found)
            number += 1
        tell(ended=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
