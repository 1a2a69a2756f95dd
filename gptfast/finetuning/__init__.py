"""Fine-tuning: heads for tasks, instruction data, and the metrics of their results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names
from gptfast.finetuning import metrics

if TYPE_CHECKING:
    from gptfast.checkpoints.adapter_config import LoraConfig
    from gptfast.checkpoints.prompt_config import PromptTuningConfig
    from gptfast.finetuning.api import finetune
    from gptfast.finetuning.example_files import Examples, read_examples
    from gptfast.finetuning.instructions import Conversations, pack, response_mask, set_up_chat
    from gptfast.finetuning.predictions import Prediction, TaskOutput
    from gptfast.finetuning.results import FinetuneResult
    from gptfast.finetuning.task_model import TaskModel

__all__ = [
    "Conversations",
    "Examples",
    "FinetuneResult",
    "LoraConfig",
    "Prediction",
    "PromptTuningConfig",
    "TaskModel",
    "TaskOutput",
    "finetune",
    "metrics",
    "pack",
    "read_examples",
    "response_mask",
    "set_up_chat",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Conversations": "gptfast.finetuning.instructions",
        "Examples": "gptfast.finetuning.example_files",
        "FinetuneResult": "gptfast.finetuning.results",
        "LoraConfig": "gptfast.checkpoints.adapter_config",
        "PromptTuningConfig": "gptfast.checkpoints.prompt_config",
        "Prediction": "gptfast.finetuning.predictions",
        "TaskModel": "gptfast.finetuning.task_model",
        "TaskOutput": "gptfast.finetuning.predictions",
        "finetune": "gptfast.finetuning.api",
        "pack": "gptfast.finetuning.instructions",
        "read_examples": "gptfast.finetuning.example_files",
        "response_mask": "gptfast.finetuning.instructions",
        "set_up_chat": "gptfast.finetuning.instructions",
    },
)
