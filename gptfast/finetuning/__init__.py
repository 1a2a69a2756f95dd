"""Fine-tuning: heads for tasks, instruction data, and the metrics of their results."""

from gptfast.finetuning import metrics

__all__ = ["metrics"]
