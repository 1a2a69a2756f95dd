"""Predictions of a task model, from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


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
