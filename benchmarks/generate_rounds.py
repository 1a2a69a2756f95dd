"""Rounds in which several programs take turns, and what of them counts."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FOREIGN = 0.06  # of the CPU time of a turn, that others may take
TRIES = 3  # of a turn that others disturb, before the round is dropped
TURN = 0.4  # seconds at least: /proc counts in hundredths of a second
TICKS = os.sysconf("SC_CLK_TCK")


class Worker(Protocol):
    """A program that does a piece of work when it is asked."""

    name: str

    def ask(self, *words: Any) -> dict[str, Any]: ...

    def cpu_seconds(self) -> float: ...


def busy_seconds(stat: str) -> float:
    """CPU time that all processes have had, and that other machines took (steal), from /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def process_seconds(stat: str) -> float:
    """CPU time of a process with its threads, from /proc/PID/stat; the name in it may hold spaces and brackets."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@dataclass(frozen=True)
class Turn:
    """Tokens a second, the share of the CPU time that others took, and what a read loop reached then (ours: bytes/s)."""

    rate: float
    foreign: float
    reading: float = 0.0


@dataclass
class Rounds:
    """Turns of everybody, round by round; `dropped` rounds were disturbed, `repeated` turns made again."""

    names: list[str]
    kept: list[dict[str, Turn]]
    dropped: int = 0
    repeated: int = 0

    def rates(self, name: str) -> list[float]:
        return [one[name].rate for one in self.kept]

    def ratios(self, ours: str, name: str) -> list[float]:
        """How many times the speed of `name` ours has, in each round."""
        return [one[ours].rate / one[name].rate for one in self.kept]

    def shares(self, ours: str, size: float) -> list[float]:
        """Of a loop that reads `size` bytes once a step, how much ours reaches, in each round."""
        return [one[ours].rate * size / one[ours].reading for one in self.kept if one[ours].reading]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rotated(names: list[str], by: int) -> list[str]:
    """Nobody always follows the same one, or always begins."""
    by %= len(names)
    return names[by:] + names[:by]


def quiet(worker: Worker, most: float = 2.0) -> None:
    """Wait until its threads have stopped spinning: OpenMP's go on for a while after the work."""
    until, before = time.monotonic() + most, worker.cpu_seconds()
    while time.monotonic() < until:
        time.sleep(0.05)
        now = worker.cpu_seconds()
        if now == before:
            return
        before = now


def take_turn(worker: Worker, words: tuple[Any, ...], tokens: int, reads: bool, cores: int) -> Turn:
    """Ask until TURN is over, for the median; with a read loop before and after where the worker has one."""
    start, all_before, own_before = time.monotonic(), busy_now(), worker.cpu_seconds()
    reading = [worker.ask("read")] if reads else []
    times = []
    while not times or time.monotonic() - start < TURN:
        times.append(worker.ask(*words)["seconds"])
    reading += [worker.ask("read")] if reads else []
    passed = time.monotonic() - start
    foreign = (busy_now() - all_before) - (worker.cpu_seconds() - own_before)
    rate = statistics.mean(r["bytes"] / r["seconds"] for r in reading) if reading else 0.0
    return Turn(tokens / statistics.median(times), max(0.0, foreign) / (passed * cores), rate)


def busy_now() -> float:
    return busy_seconds(Path("/proc/stat").read_text())


def run_rounds(
    workers: dict[str, Worker],
    turn: Callable[[Worker], Turn],
    wanted: int,
    until: float,
    foreign: float = FOREIGN,
    settle: Callable[[Worker], None] = quiet,
) -> Rounds:
    """`wanted` rounds that nobody disturbed, of three times as many at most; none is begun after `until`, but the first.
    A turn of which others took more than `foreign` is made again; where that does not help the round is dropped."""
    found = Rounds(list(workers), [])
    for i in range(3 * wanted):
        if len(found.kept) == wanted or (i and time.monotonic() > until):
            break
        one: dict[str, Turn] = {}
        for name in rotated(found.names, i):
            for _ in range(TRIES):
                one[name] = turn(workers[name])
                settle(workers[name])
                if one[name].foreign <= foreign:
                    break
                found.repeated += 1
            else:
                found.dropped += 1
                break
        else:
            found.kept.append(one)
    return found
