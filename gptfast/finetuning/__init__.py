"""Fine-tuning: heads for tasks, instruction data, and the metrics of their results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names
from gptfast.finetuning import metrics

if TYPE_CHECKING:
    from gptfast.finetuning.predictions import Prediction
    from gptfast.finetuning.task_model import TaskModel, TaskOutput

__all__ = ["Prediction", "TaskModel", "TaskOutput", "metrics"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Prediction": "gptfast.finetuning.predictions",
        "TaskModel": "gptfast.finetuning.task_model",
        "TaskOutput": "gptfast.finetuning.task_model",
    },
)
