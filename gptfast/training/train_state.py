"""The progress of a run, and how it is read from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from gptfast._json import field as json_field
from gptfast._json import items
from gptfast.training.checksums import TRAINER

_FIRST = ("step", "planned_steps", "best_val_loss", "best_step", "seconds")  # older checkpoints may lack the others


@dataclass
class TrainState:
    """The progress of a run.

    step: number of updates.
    planned_steps: the last step; None until max_minutes has been converted to steps.
    best_val_loss, best_metric, best_step: loss, metric and step of the best evaluation; without a metric the loss decides.
    evaluated: step of the last evaluation. stale: evaluations since the best one.
    seconds: wall-clock time of all sessions.
    rows: rows of tokens in all updates; None in older checkpoints: step * rows_per_step.
    eval_batch_size: rows of an evaluation's batch: the run's first batch_size, so that evaluations stay comparable when it
        changes; None in older checkpoints: batch_size.
    best_ema_loss, best_ema_step: of the average of the weights.
    recent: loss and norm of the gradient of the last steps. left_out: first row and number of rows of batches that are not
        trained on (`gptfast.training.spikes`).
    """

    step: int = 0
    planned_steps: int | None = None
    best_val_loss: float | None = None
    best_step: int = 0
    best_metric: float | None = None
    evaluated: int = 0
    stale: int = 0
    best_ema_loss: float | None = None
    best_ema_step: int = 0
    seconds: float = 0.0
    rows: int | None = None
    eval_batch_size: int | None = None
    recent: list[list[float]] = field(default_factory=list)
    left_out: list[list[int]] = field(default_factory=list)

    @classmethod
    def read(cls, found: dict[str, Any]) -> TrainState:
        """The state in a trainer.json, of this version or an older one.

        Raises:
            ValueError: a field is missing, unknown, or of another kind.
        """
        hints = get_type_hints(cls)
        for name, hint in hints.items():
            if name in found or name in _FIRST:
                json_field(found, name, _kinds(hint), TRAINER, inside="state")
        if found.keys() - hints.keys():
            unknown = ", ".join(sorted(found.keys() - hints.keys()))
            raise ValueError(f"state has {unknown}, which this version does not know")
        for name, kind in (("recent", float), ("left_out", int)):
            for pair in found.get(name, ()):
                if len(items(pair, kind, f"state.{name}", TRAINER)) != 2:
                    raise ValueError(f"state.{name} has {pair}; expected two numbers")
        return cls(**found)


def _kinds(hint: Any) -> tuple[type, ...]:
    """The kinds of JSON values of an annotation: numbers and null of `int | None`."""
    return tuple(get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
