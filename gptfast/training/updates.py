"""The updates of a training run: gradient, clipping, optimizers, what is done where a step goes wrong, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptfast.models.export import write_tensors
from gptfast.training.checkpoint import (
    OPTIMIZER,
    Checkpoint,
    TrainState,
    copy_checkpoint,
    described_run,
    read_checkpoint,
    saved_step,
    write_checkpoint,
)
from gptfast.training.config import TrainConfig
from gptfast.training.gradients import clip_gradients
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


class Updates:
    """The part of `Loop` that changes the weights and writes them; its attributes are set there."""

    objective: Objective
    config: TrainConfig
    state: TrainState
    source: dict[str, Any]
    optimizers: list[torch.optim.Optimizer]
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
    _wrong_in_a_row: int

    def _update(self) -> dict[str, Any]:
        """Update the weights once; returns loss, learning rate and norm of the gradient, and what was wrong with them."""
        state, config = self.state, self.config
        rate = learning_rate(state.step, config, state.planned_steps or math.inf)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        rows = beyond(state.rows or 0, config.rows_per_step, state.left_out)
        self._unfinished = self.objective.network.dropout_step
        batches = self.objective.batches(rows, config)
        self._rows = config.batch_size * len(batches)
        figures = self.objective.add_gradients(batches, self.autocast, self.device)
        loss = figures["loss"]
        norm = clip_gradients(parameters_of(self.optimizers), config.grad_clip or math.inf, self.ranks)
        record = {**figures, "lr": rate, "grad_norm": norm}
        wrong = what_is_wrong(loss, norm, state.recent)
        if wrong:
            finite = {name: value for name, value in record.items() if math.isfinite(value)}
            record = {**finite, "wrong": wrong, "done": self._act_on(wrong, batches, rows, loss, norm, rate)}
        else:
            remember(state.recent, loss, norm)
            self._wrong_in_a_row = 0
        for optimizer in self.optimizers:
            if record.get("done", "trained") == "trained":
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._unfinished = None
        if record.get("done") != "rewound":
            state.step += 1
            state.rows = rows + self._rows
        return record

    def _act_on(self, wrong: str, batches: list[Any], rows: int, loss: float, norm: float, rate: float) -> str:
        """What `on_spike` asks for: "trained" or "left out", or "rewound", which changes the state.

        Raises:
            RuntimeError: the run is to stop.
        """
        choice, finite = self.config.on_spike, math.isfinite(loss) and math.isfinite(norm)
        self._wrong_in_a_row += 1
        if choice is None and finite:
            self.progress.note(f"step {self.state.step + 1}: {wrong}")
            return "trained"
        if choice in (None, "stop") or too_many(self._wrong_in_a_row):
            raise RuntimeError(self._why_stopped(wrong, batches, finite, rate))
        if choice == "rewind":
            self._rewind(wrong, rows)
            return "rewound"
        self.progress.note(f"step {self.state.step + 1}: {wrong}; its batch is left out")
        return "left out"

    def _why_stopped(self, wrong: str, batches: list[Any], finite: bool, rate: float) -> str:
        step, network = self.state.step + 1, self.objective.network
        place, again = "", ""
        if not finite:
            place = self.objective.where_not_finite(batches, self.autocast, self.device, self._unfinished)
        if self._is_main or (self.ranks is not None and self.ranks.sharding):
            about = {"step": step, "wrong": wrong, "dtype": self.config.dtype}
            about["dropout"] = [network.dropout_seed, self._unfinished]
            try:
                again = self.objective.keep(self.out / f"bad-step-{step:06d}", batches, about)
            except OSError as error:
                again = f"(the step could not be kept: {error})"
        return (
            f"training: {wrong} at step {step}, where the learning rate is {rate:.2g}"
            + (f"; not finite first: {place}" if place else "")
            + "; saved checkpoints are intact - lower learning_rate or raise warmup_steps"
            + (f"; repeat the step with: {again}" if again else "")
        )

    def _load_optimizers(self, checkpoint: Checkpoint) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()
        if checkpoint.state.step:  # before the first step there is no state
            load_optimizers(checkpoint.folder, self.objective.network, self.optimizers)

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
        if ranks is not None and ranks.sharding:
            parts = Parts(ranks, self._saves, self.objective.network, self.optimizers, self.saver.background)
            self.saver.save(
                partial(parts.lead, self._writing()) if ranks.is_main else partial(parts.follow, self.out / "last")
            )
        elif self._is_main and self.saver.background:
            self.saver.save(self._alone(copy=True))
        elif ranks is None:
            self._alone()()
        elif not self.saver.background:
            ranks.main_first(lambda: self._alone()(), "the checkpoint")

    def save_alone(self) -> None:
        """Save what the last whole step left, where other ranks are lost, unless one of them has, or the model is divided."""
        if self.ranks is not None and self.ranks.sharding:
            return
        if self._unfinished is not None:
            self.objective.network.dropout_step = self._unfinished
        with suppress(OSError):
            self.saver.finish()
        if saved_step(self.out / "last") < self.state.step:
            self._alone()()

    def _alone(self, copy: bool = False) -> Callable[[], None]:
        """A function that writes the checkpoint of a model that this process has whole; with `copy` as it is now."""
        write, tensors = self.objective.writer(copy), optimizer_tensors(self.objective.network, self.optimizers)
        if copy:
            tensors = {name: x.to("cpu", copy=True) for name, x in tensors.items()}

        def content(stage: Path) -> dict[str, str]:
            write(stage)
            write_tensors(stage / OPTIMIZER, tensors)
            return {}

        return partial(self._writing(), content)

    def _writing(self) -> Callable[[Callable[[Path], dict[str, str]]], None]:
        """A function of what writes model and optimizers to a folder: it writes the checkpoint of the run as it is now."""
        state, objective = self.state, self.objective
        state.seconds, state.evaluated = self.clock.seconds, self._evaluated
        trainer = described_run(objective.network, state, self.config, self.source)
        last, is_best = self.out / "last", state.best_step == state.step > 0

        def write(content: Callable[[Path], dict[str, str]]) -> None:
            if self.config.keep_last > 1 and self._last_is_intact:
                keep_last(self.out)
            write_checkpoint(last, trainer, objective.tokenizer, content)
            if is_best:
                copy_checkpoint(last, self.out / "best")
            self._last_is_intact = True
            forget(self.out, self.config.keep_last)

        return write
