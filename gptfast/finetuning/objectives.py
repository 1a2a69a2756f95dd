"""The objectives of fine-tuning: a task with its metric, or texts and replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast.data.sampler import shuffled
from gptfast.finetuning import metrics
from gptfast.finetuning.examples import Row
from gptfast.finetuning.instructions import IGNORED, Packed, pack
from gptfast.finetuning.task_model import TaskModel
from gptfast.models import GPT
from gptfast.tokenizer import Tokenizer
from gptfast.training.config import TrainConfig
from gptfast.training.objective import Autocast, Evaluation, Objective
from gptfast.training.routing import Routing

_LOGITS = 1 << 26  # at most, in a forward of an evaluation, which holds all of them
Write = Callable[[Any, Path], None]
Rows = tuple[list[list[Row]], list[Any]]  # as `TaskModel.rows` returns them


def examples_of_rows(row: int, count: int, n: int, seed: int) -> list[int]:
    """The numbers of the examples of `count` rows. Each epoch goes through all n examples in an order of its own.

    Args:
        row: number of the first row, counted from the beginning of the run.
    """
    return np.concatenate([part for _, part in shuffled(row, count, n, seed)]).tolist()


def examples_of_step(row: int, n: int, config: TrainConfig) -> list[list[int]]:
    """The numbers of the examples of the step that begins with row number `row`, by batch."""
    order = examples_of_rows(row, config.rows_per_step, n, config.seed)
    return [order[first : first + config.batch_size] for first in range(0, len(order), config.batch_size)]


class TaskObjective(Objective):
    """A task: its loss and the auxiliary language-modelling loss; a metric decides which step is the best.

    Args:
        model: of the task.
        train, held_out: what `TaskModel.rows` returns of the examples.
        metric: a function of `gptfast.finetuning.metrics`.
        lm_coef: weight of the language-modelling loss.
        write: writes the model to a folder.
        routing: of a model with experts, whose auxiliary loss over all but padding is minimised too; None: it is not.
    """

    def __init__(
        self,
        model: TaskModel,
        train: Rows,
        held_out: Rows,
        metric: str,
        lm_coef: float,
        write: Write,
        routing: Routing | None = None,
    ) -> None:
        self._routing = routing
        self.network, self.tokenizer, self.metric, self.lm_coef = model, None, metric, lm_coef
        self.train, self.held_out, self._write = train, held_out, write
        self.train_rows = train[0]
        self.tokens_per_row = sum(len(row) for rows in train[0] for row in rows) / len(train[0])

    def batches(self, row: int, config: TrainConfig) -> list[dict[str, Tensor]]:
        groups, targets = self.train
        parts = examples_of_step(row, len(groups), config)
        return [self.network.collate([groups[i] for i in part], [targets[i] for i in part]) for part in parts]

    def add_gradients(
        self, batches: list[dict[str, Tensor]], autocast: Autocast, device: torch.device
    ) -> dict[str, Any]:
        task, lm, part = 0.0, 0.0, 1 / len(batches)
        weighs = self.network.class_weights is not None  # else all passes of a step count alike
        weights = [_weight(self.network, batch["labels"]) if weighs else 1.0 for batch in batches]
        if self._routing is not None:
            self._routing.begin()
        for batch, weight in zip(batches, weights, strict=True):
            share = weight / (sum(weights) or 1.0)
            with autocast(), nullcontext() if self._routing is None else self._routing.watched():
                out = self.network(**batch, lm_coef=self.lm_coef)
            whole = out.task_loss * share
            if out.lm_loss is not None:
                whole = whole + self.lm_coef * part * out.lm_loss
            if self._routing is not None:
                real = self.network.real_tokens(batch["ids"], batch.get("attention_mask"))
                whole = whole + part * self._routing.loss(batch["ids"].masked_fill(~real, IGNORED), part)
            whole.backward()
            task += float(out.task_loss.detach()) * share
            lm += 0.0 if out.lm_loss is None else float(out.lm_loss.detach()) * part
        losses = {"loss": task + self.lm_coef * lm, "task_loss": task, **({"lm_loss": lm} if self.lm_coef else {})}
        return losses | ({} if self._routing is None else self._routing.figures())

    def evaluate(self, batch_size: int, config: TrainConfig, autocast: Autocast, device: torch.device) -> Evaluation:
        loss, true, found = self.predict(batch_size, autocast)
        return Evaluation(loss, score(self.metric, true, found))

    @torch.no_grad()
    def predict(self, batch_size: int, autocast: Autocast) -> tuple[float, list[Any], list[Any]]:
        """The task's mean loss over the held-out examples, their labels or scores, and those that the model predicts."""
        groups, targets = self.held_out
        order = sorted(range(len(groups)), key=lambda i: max(map(len, groups[i])))  # rows of one length: little padding
        training, total, weights, found = self.network.training, 0.0, 0.0, {}
        self.network.eval()
        try:
            for n in range(0, len(order), batch_size):
                part = order[n : n + batch_size]
                batch = self.network.collate([groups[i] for i in part], [targets[i] for i in part])
                with autocast():
                    out = self.network(**batch, lm_coef=0)
                weight = _weight(self.network, batch["labels"])
                total, weights = total + float(out.task_loss) * weight, weights + weight
                predicted = out.logits if self.network.task == "similarity" else out.logits.argmax(-1)
                found.update(zip(part, predicted.tolist(), strict=True))
        finally:
            self.network.train(training)
        return total / (weights or 1.0), list(targets), [found[i] for i in range(len(groups))]

    def write(self, folder: Path) -> None:
        self._write(self.network, folder)


def _weight(model: TaskModel, labels: Tensor) -> float:
    """What a batch's mean loss counts among those of others: as much as its examples, by the weights of their classes."""
    return float(len(labels) if model.class_weights is None else model.class_weights[labels].sum())


def score(metric: str, true: Sequence[Any], found: Sequence[Any]) -> float:
    """A metric of predictions. A correlation with constant values, which is not defined, counts as 0."""
    if metric in ("pearson", "spearman") and (len(set(found)) == 1 or len(set(true)) == 1):
        return 0.0
    return getattr(metrics, metric)(true, found)


class TextObjective(Objective):
    """Texts or replies: the mean cross-entropy of the tokens that are learnt. The loss decides which step is the best.

    Args:
        model: a GPT.
        train, held_out: (ids, mask) rows; see `gptfast.finetuning.response_mask`.
        tokenizer: saved with every checkpoint.
        write: writes the model to a folder.
        routing: of a model with experts, whose auxiliary loss over all tokens is minimised too; None: it is not.
    """

    def __init__(
        self,
        model: GPT,
        train: Sequence[tuple[Row, Row]],
        held_out: Sequence[tuple[Row, Row]],
        tokenizer: Tokenizer,
        write: Write,
        routing: Routing | None = None,
    ) -> None:
        self._routing = routing
        self.network, self.tokenizer, self._write = model, tokenizer, write
        self.train = self.train_rows = train
        self.held_out = held_out
        self.tokens_per_row = sum(len(ids) for ids, _ in train) / len(train)

    def batches(self, row: int, config: TrainConfig) -> list[Packed]:
        return [pack([self.train[i] for i in part]) for part in examples_of_step(row, len(self.train), config)]

    def add_gradients(self, batches: list[Packed], autocast: Autocast, device: torch.device) -> dict[str, Any]:
        counts = [learnt(batch) for batch in batches]
        total = 0.0
        if self._routing is not None:
            self._routing.begin()
        for batch, count in zip(batches, counts, strict=True):
            share = count / sum(counts)
            with nullcontext() if self._routing is None else self._routing.watched():
                loss = self._loss(batch, autocast, device)
            whole = loss if self._routing is None else loss + self._routing.loss(batch.ids, share)
            (whole * share).backward()
            total += float(loss.detach()) * share
        return {"loss": total} | ({} if self._routing is None else self._routing.figures())

    @torch.no_grad()
    def evaluate(self, batch_size: int, config: TrainConfig, autocast: Autocast, device: torch.device) -> Evaluation:
        training, total, count = self.network.training, 0.0, 0
        self.network.eval()
        try:
            for batch in self._evaluated(batch_size):
                total += float(self._loss(batch, autocast, device)) * learnt(batch)
                count += learnt(batch)
        finally:
            self.network.train(training)
        return Evaluation(total / count)

    def _evaluated(self, batch_size: int) -> Iterator[Packed]:
        """The held-out rows in batches whose logits are not too many."""
        part: list[tuple[Row, Row]] = []
        for row in self.held_out:
            tokens = sum(len(ids) for ids, _ in (*part, row))
            if part and (len(part) == batch_size or tokens * self.network.config.vocab_size > _LOGITS):
                yield pack(part)
                part = []
            part.append(row)
        yield pack(part)

    def _loss(self, batch: Packed, autocast: Autocast, device: torch.device) -> Tensor:
        ids, targets, ends = (x.to(device) for x in (batch.ids, batch.targets, batch.cu_seqlens))
        with autocast():
            return self.network(ids, targets, cu_seqlens=ends)[1]

    def write(self, folder: Path) -> None:
        self._write(self.network, folder)


def learnt(batch: Packed) -> int:
    """How many tokens of a batch count in the loss."""
    return int((batch.targets != IGNORED).sum())


def perplexity(loss: float) -> float:
    """exp(loss), of a mean cross-entropy in nats; inf where that is too large for a float."""
    with suppress(OverflowError):
        return math.exp(loss)
    return math.inf
