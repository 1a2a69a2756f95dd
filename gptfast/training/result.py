"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    steps, seconds: number of steps and wall-clock time of all sessions.
    val_loss: loss of this session's last evaluation; None: there was no evaluation.
    best_val_loss, best_step: loss and step of the best evaluation.
    tokens_per_second: speed of this session's last steps, without evaluations and checkpoints.
    interrupted: the signal that ended the run early, or None.
    signal: the one that came, also after the last step, when it ended nothing; or None.
    waiting: part of the time in which threads waited for a core that another program used; None: not known.
    best_metric: metric of the best evaluation; None: the objective has none.
    """

    steps: int
    seconds: float
    val_loss: float | None
    best_val_loss: float | None
    best_step: int
    tokens_per_second: float | None
    interrupted: int | None
    waiting: float | None = None
    best_metric: float | None = None
    signal: int | None = None
