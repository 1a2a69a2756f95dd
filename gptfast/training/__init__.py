"""Training: configuration, loop, checkpoints and log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names

if TYPE_CHECKING:
    from gptfast.training.checkpoint import Checkpoint, read_checkpoint
    from gptfast.training.config import TrainConfig
    from gptfast.training.gradients import accumulate_gradients
    from gptfast.training.loop import Loop
    from gptfast.training.objective import Evaluation, Objective
    from gptfast.training.result import TrainResult
    from gptfast.training.trainer import Trainer

__all__ = [
    "Checkpoint",
    "Evaluation",
    "Loop",
    "Objective",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "accumulate_gradients",
    "read_checkpoint",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Checkpoint": "gptfast.training.checkpoint",
        "TrainConfig": "gptfast.training.config",
        "Evaluation": "gptfast.training.objective",
        "Loop": "gptfast.training.loop",
        "Objective": "gptfast.training.objective",
        "TrainResult": "gptfast.training.result",
        "Trainer": "gptfast.training.trainer",
        "accumulate_gradients": "gptfast.training.gradients",
        "read_checkpoint": "gptfast.training.checkpoint",
    },
)
