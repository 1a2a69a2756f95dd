"""A ladder of small trainings: the sizes and numbers of tokens that a budget of time allows, scaling laws, and a loss that they predict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names

if TYPE_CHECKING:
    from gptfast.ladder.options import LadderOptions
    from gptfast.ladder.plan import Plan, Run, make_plan
    from gptfast.ladder.run import Ladder
    from gptfast.ladder.speed import flops_per_second, step_seconds
    from gptfast.ladder.summary import fit_all, summarise

__all__ = [
    "Ladder",
    "LadderOptions",
    "Plan",
    "Run",
    "fit_all",
    "flops_per_second",
    "make_plan",
    "step_seconds",
    "summarise",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Ladder": "gptfast.ladder.run",
        "LadderOptions": "gptfast.ladder.options",
        "Plan": "gptfast.ladder.plan",
        "Run": "gptfast.ladder.plan",
        "fit_all": "gptfast.ladder.summary",
        "flops_per_second": "gptfast.ladder.speed",
        "make_plan": "gptfast.ladder.plan",
        "step_seconds": "gptfast.ladder.speed",
        "summarise": "gptfast.ladder.summary",
    },
)
