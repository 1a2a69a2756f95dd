"""What task models compute, and their predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gptfast._warn import warn

TaskModel = Any  # of gptfast.finetuning.task_model, which imports this module

_BATCH = 32  # examples of a forward in `predict`


@dataclass(frozen=True)
class TaskOutput:
    """What `TaskModel.forward` computes.

    logits: (B, classes), (B, N) for choices, (B,) scores for similarity.
    loss: task_loss + lm_coef * lm_loss. task_loss: cross-entropy, or the mean squared error of scores. lm_loss: see
    `TaskModel.forward`. All three are None without labels, lm_loss also where lm_coef is 0.
    """

    logits: Tensor
    loss: Tensor | None = None
    task_loss: Tensor | None = None
    lm_loss: Tensor | None = None


class Prediction(dict[str, Any]):
    """{"label", "probabilities"}, or {"score"}; the keys are attributes too, as in transformers' outputs."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"Prediction has no {name!r}; it has {', '.join(self)}")
        return self[name]


def predictions(task: str, labels: Sequence[str], logits: Tensor) -> list[Prediction]:
    """One for each row of logits; see `TaskModel.predict`."""
    if task == "similarity":
        return [Prediction(score=score) for score in logits.double().tolist()]
    rows = logits.double().softmax(-1).tolist()
    if task == "choice":
        counts = (logits > -float("inf")).sum(1).tolist()  # an example with fewer choices is padded at its end
        kept = [row[:n] for row, n in zip(rows, counts, strict=True)]
        return [Prediction(label=row.index(max(row)), probabilities=row) for row in kept]
    named = [dict(zip(labels, row, strict=True)) for row in rows]
    return [Prediction(label=max(row, key=row.__getitem__), probabilities=row) for row in named]


def predict(model: TaskModel, examples: Iterable[Any]) -> list[Prediction]:
    """See `TaskModel.predict`."""
    if isinstance(examples, (str, Mapping)):
        raise TypeError(f"TaskModel.predict: examples is a {type(examples).__name__}; expected a list of them")
    examples = list(examples)
    training, before = model.training, model.truncated
    model.eval()
    try:
        parts = [examples[n : n + _BATCH] for n in range(0, len(examples), _BATCH)]
        found = [
            p
            for part in parts
            for p in predictions(model.task, model.labels, model(**model.batch(part, labels=False)).logits)
        ]
    finally:
        model.train(training)
    if model.truncated > before:
        virtual = model.gpt.virtual_tokens()
        said = f" without the {virtual} virtual tokens of the soft prompt" if virtual else ""
        warn(
            f"TaskModel.predict: {model.truncated - before} of {len(examples)} examples are longer than block_size "
            f"{model.gpt.config.block_size}{said}; their longest texts were cut at the end"
        )
    return found
