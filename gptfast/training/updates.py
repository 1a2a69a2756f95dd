"""The updates of a training run: gradient, clipping, optimizers, what is done where a step goes wrong, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptfast._folders import is_saved_by_another
from gptfast.models.export import write_tensors
from gptfast.training import ema
from gptfast.training.checkpoint import (
    OPTIMIZER,
    Checkpoint,
    copy_checkpoint,
    described_run,
    read_checkpoint,
    saved_step,
    write_checkpoint,
)
from gptfast.training.clipping import clipped_step, gradient_norm, only_adamw
from gptfast.training.config import TrainConfig
from gptfast.training.copies import Copies
from gptfast.training.ema import WeightAverage
from gptfast.training.kept import forget, keep_last
from gptfast.training.log import Log, NoLog
from gptfast.training.objective import Objective
from gptfast.training.optim import optimizer_tensors, parameters_of
from gptfast.training.parts import Parts, load_optimizers
from gptfast.training.progress import TrainingProgress
from gptfast.training.ranks import Ranks
from gptfast.training.saver import Saver
from gptfast.training.schedule import learning_rate
from gptfast.training.spikes import beyond, remember, too_many, what_is_wrong
from gptfast.training.timing import RunClock
from gptfast.training.train_state import TrainState


@dataclass(frozen=True)
class Step:
    """A step whose gradient is there.

    number: from 1 on. batches, rows: what it sees, and the first of its rows. dropout_step: of the network, before it.
    figures: "loss", "grad_norm", "lr" and others, of which some may be tensors on a GPU.
    """

    number: int
    batches: list[Any]
    rows: int
    dropout_step: int | None
    figures: dict[str, Any]


class Updates:
    """The part of `Loop` that changes the weights and writes them; its attributes are set there."""

    objective: Objective
    config: TrainConfig
    state: TrainState
    source: dict[str, Any]
    optimizers: list[torch.optim.Optimizer]
    average: WeightAverage | None
    device: torch.device
    dtype: torch.dtype
    out: Path
    log: Log | NoLog
    progress: TrainingProgress
    clock: RunClock
    ranks: Ranks | None
    saver: Saver
    _is_main: bool
    _last_is_intact: bool
    _unfinished: int | None
    _evaluated: int
    _saved: int
    _saves: int
    _rows: int
    _loss: float
    _open: Step | None
    _wrong_in_a_row: int

    def _update(self) -> dict[str, Any]:
        """Update the weights once; returns loss, learning rate and norm of the gradient, and what was wrong with them.

        On a GPU, where nothing is to be done about a spike, loss and norm stay there and the host does not wait for them: a
        step that is not finite does not change the weights, and `_look` tells one step later.
        """
        state, config, objective = self.state, self.config, self.objective
        rate = learning_rate(state.step, config, state.planned_steps or math.inf)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        rows = beyond(state.rows or 0, config.rows_per_step, state.left_out)
        self._unfinished = objective.network.dropout_step
        batches = objective.batches(rows, config)
        self._rows = config.batch_size * len(batches)
        batches = objective.cut(batches, state.step, config)
        figures = objective.add_gradients(batches, self.autocast, self.device)
        norm = gradient_norm(parameters_of(self.optimizers), self.ranks)
        step = Step(state.step + 1, batches, rows, self._unfinished, {**figures, "lr": rate, "grad_norm": norm})
        later = self._looks_later(norm)
        if later:
            self._look()
            self._open, record = step, step.figures
        else:
            record = self._judged(step)
        if record.get("done", "trained") == "trained":
            clipped_step(self.optimizers, norm, config.grad_clip, guarded=later)
            if self.average is not None:
                self.average.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._unfinished = None
        if record.get("done") != "rewound":
            state.step += 1
            state.rows = rows + self._rows
        return record

    def _looks_later(self, norm: torch.Tensor) -> bool:
        """Whether the host can go on without the norm."""
        return norm.is_cuda and self.ranks is None and self.config.on_spike is None and only_adamw(self.optimizers)

    def _look(self) -> dict[str, Any]:
        """The record of the last step that was not looked at, once its loss and norm are there; {}: there is none."""
        step, self._open = self._open, None
        if step is None:
            return {}
        record = self._judged(step)
        if "wrong" in record:
            self.log.write(step=step.number, **record)
        return record

    def _judged(self, step: Step) -> dict[str, Any]:
        """The record of a step, and what is wrong with it and was done about it.

        Raises:
            RuntimeError: the run is to stop.
        """
        figures = step.figures.items()
        record: dict[str, Any] = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in figures}
        loss, norm = record["loss"], record["grad_norm"]
        self._loss = loss if math.isfinite(loss) else self._loss
        wrong = what_is_wrong(loss, norm, self.state.recent)
        if not wrong:
            remember(self.state.recent, loss, norm)
            self._wrong_in_a_row = 0
            return record
        finite = {name: x for name, x in record.items() if isinstance(x, list) or math.isfinite(x)}
        return {**finite, "wrong": wrong, "done": self._act_on(wrong, step, len(finite) == len(record))}

    def _act_on(self, wrong: str, step: Step, finite: bool) -> str:
        """What `on_spike` asks for: "trained" or "left out", or "rewound", which changes the state.

        Raises:
            RuntimeError: the run is to stop.
        """
        choice = self.config.on_spike
        self._wrong_in_a_row += 1
        if choice is None and finite:
            self.progress.note(f"step {step.number}: {wrong}")
            return "trained"
        if choice in (None, "stop") or too_many(self._wrong_in_a_row):
            raise RuntimeError(self._why_stopped(wrong, step, finite))
        if choice == "rewind":
            self._rewind(wrong, step.rows)
            return "rewound"
        self.progress.note(f"step {step.number}: {wrong}; its batch is left out")
        return "left out"

    def _why_stopped(self, wrong: str, step: Step, finite: bool) -> str:
        network = self.objective.network
        place, rank, batches = "", 0, step.batches
        if not finite:
            place, rank = self.objective.where_not_finite(batches, self.autocast, self.device, step.dropout_step)
        if self._is_main and rank:
            batches = self.objective.batches_of(rank, step.rows, self.state.step, self.config)
        about = {"step": step.number, "wrong": wrong, "dtype": self.config.dtype}
        about["dropout"] = [network.dropout_seed, step.dropout_step]
        try:
            again = self.objective.keep(self.out / f"bad-step-{step.number:06d}", batches, about, rank)
        except OSError as error:
            again = f"(the step could not be kept: {error})"
        return (
            f"training: {wrong} at step {step.number}, where the learning rate is {step.figures['lr']:.2g}"
            + (f"; not finite first: {place}" if place else "")
            + "; saved checkpoints are intact - lower learning_rate or raise warmup_steps"
            + (f"; repeat the step with: {again}" if again else "")
        )

    def _load_optimizers(self, checkpoint: Checkpoint) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if checkpoint.state.step:  # before the first step there is no state
            load_optimizers(checkpoint.folder, self.objective.network, self.optimizers, self.ranks)
        if self.average is not None:
            self.average.load(checkpoint.folder)

    def _rewind(self, wrong: str, rows: int) -> None:
        """Go back to RUN/last, and leave the batch at `rows` out from now on."""
        self.saver.finish()
        old, last = self.state, self.out / "last"
        checkpoint = read_checkpoint(last)
        self.objective.restore(last)
        self._load_optimizers(checkpoint)
        network = self.objective.network
        network.dropout_seed, network.dropout_step = checkpoint.dropout
        left_out = [*old.left_out, [rows, self._rows]]
        self.state = replace(checkpoint.state, left_out=left_out, planned_steps=old.planned_steps)
        self.log.back_to(self.state.step)
        self.log.write(step=self.state.step, rewound_from=old.step + 1, wrong=wrong)
        self.progress.note(f"step {old.step + 1}: {wrong}; back to step {self.state.step}, its batch is left out")
        self._save()

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _save(self) -> None:
        """Write RUN/last, and RUN/best if this is the best step so far; with ranks, on rank 0 while the others wait, or in
        all where the model is divided."""
        ranks, self._saved = self.ranks, self.state.step
        self._saves += 1
        copies = self.saver.begin()
        if ranks is not None and ranks.sharding:
            parts = Parts(ranks, self._saves, self.objective.network, self.optimizers, copies)
            self.saver.save(
                partial(parts.lead, self._writing()) if ranks.is_main else partial(parts.follow, self.out / "last")
            )
        elif self._is_main and copies is not None:
            self.saver.save(self._alone(copies))
        elif ranks is None:
            self._alone()()
        elif copies is None:
            ranks.main_first(lambda: self._alone()(), "the checkpoint")

    def save_alone(self) -> None:
        """Save what the last whole step left, where other ranks are lost, unless one of them has, or was stopped while it did, or
        the model is divided."""
        if self.ranks is not None and self.ranks.sharding:
            return
        if self._unfinished is not None:
            self.objective.network.dropout_step = self._unfinished
        with suppress(OSError):
            self.saver.finish()
        last = self.out / "last"
        if saved_step(last) < self.state.step and not is_saved_by_another(last):
            self._alone()()

    def _alone(self, copies: Copies | None = None) -> Callable[[], None]:
        """A function that writes the checkpoint of a model that this process has whole; with `copies` as it is now."""
        write, tensors = self.objective.writer(copies), optimizer_tensors(self.objective.network, self.optimizers)
        if copies is not None:
            tensors = {name: copies.take(x) for name, x in tensors.items()}

        def content(stage: Path) -> dict[str, str]:
            write(stage)
            write_tensors(stage / OPTIMIZER, tensors)
            if average:
                write_tensors(stage / ema.NAME, average)
            return {}

        average = {} if self.average is None else self.average.tensors(copies)
        is_best = self.state.best_ema_step == self.state.step
        best = ema.best_writer(self.average if is_best else None, self.objective, self.out / "best-ema", copies)
        writing = self._writing()

        def save() -> None:
            best()  # before the state that says so
            writing(content)

        return save

    def _writing(self) -> Callable[[Callable[[Path], dict[str, str]]], None]:
        """A function of what writes model and optimizers to a folder: it writes the checkpoint of the run as it is now."""
        state, objective = self.state, self.objective
        state.seconds, state.evaluated = self.clock.seconds, self._evaluated
        trainer = described_run(objective.network, state, self.config, self.source)
        last, step, is_best = self.out / "last", state.step, state.best_step == state.step > 0

        def write(content: Callable[[Path], dict[str, str]]) -> None:
            if self.config.keep_last > 1 and self._last_is_intact:
                keep_last(self.out, step)
            write_checkpoint(last, trainer, objective.tokenizer, content)
            if is_best:
                copy_checkpoint(last, self.out / "best")
            self._last_is_intact = True
            forget(self.out, self.config.keep_last)

        return write
