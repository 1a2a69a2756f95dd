"""Runs a scheduler to its end."""

from __future__ import annotations

from gptfast.generation import Scheduler


def run(scheduler: Scheduler) -> None:
    """Step until every request is done."""
    while scheduler.waiting or scheduler.running:
        scheduler.step()
