"""The training loop."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptfast._busy import CpuWait
from gptfast._locks import FileLock
from gptfast.data import TokenFile, WindowSampler
from gptfast.machine import choose_dtype, peak_flops, resolve_device
from gptfast.models import GPT
from gptfast.ops.gemm import check_implementations, use_implementations
from gptfast.tokenizer import Tokenizer
from gptfast.training.checkpoint import (
    Checkpoint,
    TrainState,
    copy_checkpoint,
    load_optimizers,
    save_checkpoint,
)
from gptfast.training.checks import check_model
from gptfast.training.config import TrainConfig
from gptfast.training.evaluate import evaluate, evaluated_tokens, evaluation_batches
from gptfast.training.gradients import accumulate_gradients
from gptfast.training.interrupt import Interrupt
from gptfast.training.log import Log
from gptfast.training.optim import build_optimizers, parameters_of
from gptfast.training.plot import plot_losses, require_matplotlib
from gptfast.training.progress import Figures, TrainingProgress
from gptfast.training.run_folder import lock_run, make_room
from gptfast.training.schedule import learning_rate
from gptfast.training.timing import RunClock


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    steps, seconds: number of steps and wall-clock time of all sessions.
    val_loss: loss of this session's last evaluation; None: there was no evaluation.
    best_val_loss, best_step: loss and step of the best evaluation.
    tokens_per_second: speed of this session's last steps, without evaluations and checkpoints.
    interrupted: the signal that ended the run early, or None.
    waiting: part of the time in which threads waited for a core that another program used; None: not known.
    """

    steps: int
    seconds: float
    val_loss: float | None
    best_val_loss: float | None
    best_step: int
    tokens_per_second: float | None
    interrupted: int | None
    waiting: float | None = None


class Trainer:
    """Trains a GPT and writes RUN/last, RUN/best, RUN/log.jsonl and RUN/loss.png.

    Args:
        model: a float32 GPT; moved to the device of the config.
        train_tokens, val_tokens: token files, or (N,) arrays of ids.
        config: see `TrainConfig`.
        out: RUN, the folder to write.
        tokenizer: saved with every checkpoint; None: no tokenizer.
        source: JSON values that describe the data, saved with every checkpoint; None: {}.
        resume: a checkpoint of `read_checkpoint` from which `model` was loaded. The run continues bit for bit as without
            an interruption. None: a new run.
        overwrite: delete the checkpoints of a run that `out` already has.
        progress: show progress.
        tensorboard: also write event files to RUN/tensorboard.
        lock: the acquired lock of `lock_run(out)`; released at the end of `train`. None: acquired here.
    Raises:
        TypeError, ValueError: a model of another dtype, too few tokens, or tokens or a block_size that do not fit the model.
        FileExistsError: `out` already has a run.
        BlockingIOError: another process trains in `out`.
    """

    def __init__(
        self,
        model: GPT,
        train_tokens: TokenFile | np.ndarray,
        val_tokens: TokenFile | np.ndarray,
        config: TrainConfig,
        out: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        source: dict[str, Any] | None = None,
        resume: Checkpoint | None = None,
        overwrite: bool = False,
        progress: bool = True,
        tensorboard: bool = False,
        lock: FileLock | None = None,
    ) -> None:
        require_matplotlib()
        self.block_size = check_model(model, config, train_tokens, val_tokens)
        self.out, self.device = Path(out), resolve_device(config.device)
        self.dtype_reason = ""
        if config.dtype == "auto":
            dtype, self.dtype_reason = choose_dtype(self.device)
            config = config.replace(dtype=dtype)
        self.config, self.dtype = config, getattr(torch, config.dtype)
        self.model = model.to(self.device).train()
        self.tokenizer, self.source = tokenizer, source or {}
        self.sampler = WindowSampler(train_tokens, self.block_size, config.batch_size, config.seed)
        self.val_tokens = val_tokens
        self.optimizers = build_optimizers(self.model, config)
        self.state = TrainState(planned_steps=None if config.max_minutes else config.max_steps)
        self.model.dropout_seed, self.model.dropout_step = config.seed, 0
        self._methods: dict[str, str] = {}  # implementations of products before the run was resumed
        self._lock = lock or lock_run(self.out)
        try:
            if resume is None:
                make_room(self.out, overwrite)
            else:
                self._restore(resume)
            self.log = Log(self.out / "log.jsonl", self.state.step, self.out / "tensorboard" if tensorboard else None)
            self._begin_rows(resume)
        except BaseException:
            self._lock.release()
            raise
        self.progress = TrainingProgress(progress)
        self.peak_flops = peak_flops(self.dtype, self.device)
        self._loss, self._val_loss = math.nan, None  # the last step's and the last evaluation's
        self._evaluated, self._saved = 0, 0  # the steps of the last evaluation and of RUN/last

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, config = replace(checkpoint.state), self.config
        if config.max_minutes is None or config.max_minutes != checkpoint.config.max_minutes:
            state.planned_steps = None if config.max_minutes else config.max_steps
        late = config.max_minutes is not None and state.seconds >= 60 * config.max_minutes
        if late or (state.planned_steps is not None and state.step >= state.planned_steps):
            raise ValueError(
                f"{checkpoint.folder}: this run is complete ({state.step} steps, {state.seconds:.0f} s); to train on, "
                f"raise max_steps (now {config.max_steps}) or max_minutes (now {config.max_minutes})"
            )
        self.state = state
        if checkpoint.dropout[0] is not None:
            self.model.dropout_seed, self.model.dropout_step = checkpoint.dropout
        check_implementations(checkpoint.gemm)
        self._methods = checkpoint.gemm
        load_optimizers(checkpoint.folder, self.model, self.optimizers)

    def _begin_rows(self, resume: Checkpoint | None) -> None:
        """Set the position in the order of the data, which is independent of the batch size."""
        state, old = self.state, self.config if resume is None else resume.config
        state.rows = state.step * old.rows_per_step if state.rows is None else state.rows
        state.eval_batch_size = state.eval_batch_size or old.batch_size
        if (old.batch_size, old.grad_accum) != (self.config.batch_size, self.config.grad_accum):
            self.log.write(step=state.step, batch_size=self.config.batch_size, grad_accum=self.config.grad_accum)

    @property
    def eval_batch_size(self) -> int:
        return self.state.eval_batch_size or self.config.batch_size

    def train(self) -> TrainResult:
        """Train to the end, or to Ctrl-C or SIGTERM; RUN/last is saved in both cases.

        Raises:
            RuntimeError: the loss is not finite.
            OSError: a file cannot be written.
        """
        minutes = self.config.max_minutes
        waiting = CpuWait()
        self.clock = RunClock(self.state.seconds, minutes and 60 * minutes, self._evaluation_steps())
        try:
            with closing(self.log), Interrupt() as interrupt, self.progress, use_implementations(self._methods):
                interrupted = self._train(interrupt)
            seconds = self.clock.seconds
            plot_losses(self.log.records, self.out / "loss.png", f"{self.out.name}: {self.state.step} steps")
        finally:
            self._lock.release()
        return TrainResult(
            steps=self.state.step,
            seconds=seconds,
            val_loss=self._val_loss,
            best_val_loss=self.state.best_val_loss,
            best_step=self.state.best_step,
            tokens_per_second=self._tokens_per_second(),
            interrupted=interrupted,
            waiting=waiting.share(),
        )

    def _train(self, interrupt: Interrupt) -> int | None:
        """Make all steps and the last checkpoint; returns the signal that ended the run early, or None."""
        while not self._done() and interrupt.signal is None:
            self._step()
        interrupted = None if self._done() else interrupt.signal
        if interrupted is None and self._evaluated != self.state.step:
            self._evaluate()
            self._save()
            self.progress.show(self._figures(), important=True)
        elif self._saved != self.state.step:
            self._save()
        return interrupted

    def _evaluation_steps(self) -> float:
        """The expected time of an evaluation in steps: a forward pass takes a third of a step."""
        config, T = self.config, self.block_size
        tokens = evaluated_tokens(self.val_tokens, T, self.eval_batch_size, config.eval_batches)
        return tokens / (3 * config.rows_per_step * T)

    def _done(self) -> bool:
        planned = self.state.planned_steps
        return (planned is not None and self.state.step >= planned) or self.clock.out_of_time

    def _step(self) -> None:
        """Make one update, and log, evaluate and save when due."""
        config = self.config
        with self.clock.step():
            record: dict[str, float] = self._update()
        self._loss = record["loss"]
        step = self.state.step
        if self.clock.can_plan:
            record |= self._plan()
        if step == 1 or step % config.log_every == 0:
            self.log.write(step=step, **record, seconds=round(self.clock.seconds, 3))
        evaluating = step % config.eval_every == 0
        with self.clock.pause():
            if evaluating:
                self._evaluate()
            if step % config.steps_per_checkpoint == 0 or self.state.best_step == step:
                self._save()
        self.progress.show(self._figures(), important=evaluating or step == 1)

    def _update(self) -> dict[str, float]:
        """Update the weights once; returns loss, learning rate and norm of the gradient."""
        step, config = self.state.step, self.config
        rate = learning_rate(step, config, self.state.planned_steps or math.inf)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        rows = self.state.rows or 0
        batches = [self.sampler.batch_from(rows + n * config.batch_size) for n in range(config.grad_accum)]
        loss = accumulate_gradients(self.model, batches, self._autocast, self.device)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters_of(self.optimizers), config.grad_clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RuntimeError(
                f"training: the loss is {loss} and the norm of its gradient {norm} at step {step + 1}, where the "
                f"learning rate is {rate:.2g}; saved checkpoints are intact - lower learning_rate or raise warmup_steps"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.rows = rows + config.rows_per_step
        return {"loss": loss, "lr": rate, "grad_norm": norm}

    def _autocast(self) -> AbstractContextManager:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _evaluate(self) -> None:
        config, state = self.config, self.state
        batches = evaluation_batches(self.val_tokens, self.block_size, self.eval_batch_size, config.eval_batches)
        self._val_loss, _ = evaluate(self.model, batches, self._autocast, self.device)
        self._evaluated = state.step
        self.peak_flops = peak_flops(self.dtype, self.device, again=True)
        if state.best_val_loss is None or self._val_loss < state.best_val_loss:
            state.best_val_loss, state.best_step = self._val_loss, state.step
        self.log.write(step=state.step, val_loss=self._val_loss)

    def _save(self) -> None:
        """Write RUN/last, and RUN/best if this is the best step so far."""
        self.state.seconds = self.clock.seconds
        last = self.out / "last"
        save_checkpoint(last, self.model, self.optimizers, self.tokenizer, self.state, self.config, self.source)
        if self.state.best_step == self.state.step:
            copy_checkpoint(last, self.out / "best")
        self._saved = self.state.step

    def _plan(self) -> dict[str, int]:
        """Set planned_steps from the time that is left."""
        steps = self.state.step + self.clock.more_steps()
        self.state.planned_steps = steps if self.config.max_steps is None else min(steps, self.config.max_steps)
        return {"planned_steps": self.state.planned_steps}

    def _tokens_per_second(self) -> float | None:
        seconds = self.clock.step_seconds
        return None if seconds is None else self.config.rows_per_step * self.block_size / seconds

    def _figures(self) -> Figures:
        step, planned, speed = self.state.step, self.state.planned_steps, self._tokens_per_second()
        flops = None if speed is None else speed * self.model.flops_per_token(self.block_size)
        return Figures(
            step=step,
            total=planned,
            loss=self._loss,
            val_loss=self._val_loss,
            val_is_new=self._evaluated == step,
            tokens_per_second=speed,
            # None where the peak is too small, because it was measured while the machine was busy
            percent_of_peak=None if flops is None or flops > self.peak_flops else 100 * flops / self.peak_flops,
            seconds_left=None if speed is None or planned is None else (planned - step) * self.clock.seconds_per_step(),
        )
