"""The training loop."""

from __future__ import annotations

import math
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptfast._busy import CpuWait
from gptfast._locks import FileLock
from gptfast.machine import choose_dtype, peak_flops, resolve_device
from gptfast.malloc import SteadyMemory
from gptfast.ops.gemm import check_implementations, use_implementations
from gptfast.training.checkpoint import Checkpoint, checked_source
from gptfast.training.config import TrainConfig
from gptfast.training.ema import WeightAverage
from gptfast.training.interrupt import Interrupt
from gptfast.training.kept import complete_best
from gptfast.training.objective import Evaluation, Objective
from gptfast.training.optim import build_optimizers, bytes_of_training
from gptfast.training.plot import EXPERTS, plot_experts, plot_losses, require_matplotlib
from gptfast.training.progress import TrainingProgress
from gptfast.training.ranks import RankLostError, Ranks
from gptfast.training.reporting import Reporting
from gptfast.training.result import TrainResult
from gptfast.training.run_folder import lock_run, make_room
from gptfast.training.saver import Saver
from gptfast.training.sharding import shard
from gptfast.training.timing import RunClock
from gptfast.training.train_state import TrainState
from gptfast.training.updates import Updates
from gptfast.training.values import Values


class Loop(Updates, Reporting):
    """Trains an objective and writes RUN/last, RUN/best, RUN/log.jsonl, RUN/loss.png and, with experts, RUN/experts.png.

    Args:
        objective: what is trained; its network is moved to the device of the config.
        config, out, source, resume, overwrite, progress, tensorboard, log_to, async_save, values, lock, ranks: see `Trainer`.
        evaluate_first: also before the first step.
        finished_too: a run that is complete may be resumed; it makes no step.
    Raises:
        FileExistsError, BlockingIOError, TypeError: see `Trainer`.  ValueError: the network has no trainable parameter.
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        out: str | os.PathLike[str],
        *,
        source: dict[str, Any] | None = None,
        resume: Checkpoint | None = None,
        overwrite: bool = False,
        progress: bool = True,
        tensorboard: bool = False,
        log_to: str | None = None,
        async_save: bool = False,
        values: Values | None = None,
        lock: FileLock | None = None,
        ranks: Ranks | None = None,
        evaluate_first: bool = False,
        finished_too: bool = False,
    ) -> None:
        require_matplotlib()
        self.objective, self.source = objective, checked_source(source)
        self.ranks, self._is_main = ranks, ranks is None or ranks.is_main
        self.out = Path(out)
        self.device = resolve_device("TrainConfig", config.device) if ranks is None else ranks.device
        self.dtype_reason = ""
        if config.dtype == "auto":
            dtype, self.dtype_reason = choose_dtype(self.device)
            config = config.replace(dtype=dtype)
        self.config, self.dtype = config, getattr(torch, config.dtype)
        network = objective.network.train()
        if ranks is not None and ranks.sharding:
            shard(network, ranks, self.dtype, values)
        network = network.to(self.device)
        self.optimizers = build_optimizers(network, config)
        self.average = WeightAverage(network, config.ema) if config.ema else None
        self.state = TrainState(planned_steps=None if config.max_minutes else config.max_steps)
        network.dropout_seed, network.dropout_step = config.seed, 0
        getattr(network, "gpt", network).recompute = config.recompute  # a task's network has a GPT
        self._methods: dict[str, str] = {}  # implementations of products before the run was resumed
        self._finished_too, self._evaluate_first = finished_too, evaluate_first and resume is None
        self._unfinished: int | None = None  # dropout_step before a step that has not come to its end
        self._last_is_intact = resume is not None and resume.folder == self.out / "last"
        self._evaluated, self._saved = 0, 0  # the steps of the last evaluation and of RUN/last
        self.saver, self._saves, self._memory = Saver(async_save), 0, SteadyMemory()
        self._lock = (lock or lock_run(self.out)) if self._is_main else None
        try:
            if resume is not None:
                self._restore(resume)
                if self._is_main:
                    complete_best(resume, self.out)
            elif self._is_main:
                make_room(self.out, overwrite)
            self.log = self._open_log({"tensorboard" if tensorboard else None, log_to} - {None})
            self._begin_rows(resume)
        except BaseException:
            self._release()
            raise
        self.progress = TrainingProgress(progress and self._is_main)
        measured = self._is_main and objective.flops_per_token() is not None
        self.peak_flops = peak_flops(self.dtype, self.device) if measured else math.inf
        self._loss, self._rows = math.nan, config.rows_per_step  # the last step's
        self._wrong_in_a_row, self._open = 0, None
        self._found: Evaluation | None = None  # the last evaluation's

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, config = replace(checkpoint.state), self.config
        if config.max_minutes is None or config.max_minutes != checkpoint.config.max_minutes:
            state.planned_steps = None if config.max_minutes else config.max_steps
        late = config.max_minutes is not None and state.seconds >= 60 * config.max_minutes
        self.state = state
        if late or self._has_ended():
            if not self._finished_too:
                raise ValueError(
                    f"{checkpoint.folder}: this run is complete ({state.step} steps, {state.seconds:.0f} s); to train on, "
                    f"raise max_steps (now {config.max_steps}) or max_minutes (now {config.max_minutes})"
                    + (f", or patience (now {config.patience})" if config.patience else "")
                )
            self._evaluated, self._saved = state.evaluated, state.step
        if checkpoint.dropout[0] is not None:
            self.objective.network.dropout_seed, self.objective.network.dropout_step = checkpoint.dropout
        check_implementations(checkpoint.gemm)
        self._methods = checkpoint.gemm
        self._load_optimizers(checkpoint)

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
                try:
                    interrupted = self._train(interrupt)
                    self.saver.finish()
                except RankLostError:
                    self.save_alone()
                    raise
                except BaseException as error:
                    self.saver.close(error)
                    raise
            seconds = self.clock.seconds
            title = f"{self.out.name}: {self.state.step} steps"
            if self._is_main:
                plot_losses(self.log.records, self.out / "loss.png", title, self.objective.metric)
                plot_experts(self.log.records, self.out / EXPERTS, title)
        finally:
            self._release()
        return TrainResult(
            steps=self.state.step,
            seconds=seconds,
            val_loss=None if self._found is None else self._found.loss,
            best_val_loss=self.state.best_val_loss,
            best_step=self.state.best_step,
            tokens_per_second=self._tokens_per_second(),
            interrupted=interrupted,
            waiting=waiting.share(),
            best_metric=self.state.best_metric,
            signal=interrupt.signal,
        )

    def _train(self, interrupt: Interrupt) -> int | None:
        """Make all steps and the last checkpoint; returns the signal that ended the run early, or None."""
        if self.ranks is not None:
            self.ranks.signalled = lambda: interrupt.signal is not None
            if not self.ranks.sharding:  # what is divided came from one seed or one file
                self.ranks.same(self.objective.network.parameters(), "the start")
        if self._is_main or (self.ranks is not None and self.ranks.sharding):
            # no step is to wait for the memory of the copies
            self.saver.begin(bytes_of_training(self.objective.network, self.optimizers))
        if self.config.on_spike == "rewind" and self.state.step == 0:
            self._save()  # what a spike before the first checkpoint goes back to
        if self._evaluate_first:
            self._log(self._evaluation())
        done, signal = self._agree(interrupt)
        while not done and signal is None:
            self._step()
            done, signal = self._agree(interrupt)
        self._look()
        interrupted = None if done else signal
        if interrupted is None and self._evaluated != self.state.step:
            self._evaluate()
            self._save()
            self.progress.show(self._figures(), important=True)
        elif self._saved != self.state.step:
            self._save()
        return interrupted

    def _agree(self, interrupt: Interrupt) -> tuple[bool, int | None]:
        """Whether the run has come to its end, and the signal that ends it early; of all ranks the same."""
        done, signal = self._has_ended() or self.clock.out_of_time, interrupt.signal
        if self.ranks is None:
            return done, signal
        self.ranks.step = self.state.step + 1
        found = self.ranks.exchange([done, signal or 0, self.state.planned_steps or 0], "the beginning")
        self.state.planned_steps = int(found[0][2]) or None  # rank 0's clock decides
        return bool(found[0][0]), max(int(values[1]) for values in found) or None

    def _evaluation_steps(self) -> float:
        """The expected time of an evaluation in steps: a forward pass takes a third of a step."""
        tokens = self.objective.evaluated_tokens(self.eval_batch_size, self.config)
        return tokens / (3 * self.config.rows_per_step * self.objective.tokens_per_row)

    def _has_ended(self) -> bool:
        """Whether all planned steps are made, or the evaluations have not become better for too long."""
        planned, patience = self.state.planned_steps, self.config.patience
        return (planned is not None and self.state.step >= planned) or (
            patience is not None and self.state.stale >= patience
        )

    def _step(self) -> None:
        """Make one update, and log, evaluate and save when due."""
        config = self.config
        self.saver.before_step()
        with self.clock.step():
            record = self._update()
        self._memory.after_step()
        if record.get("done") == "rewound":
            return
        state, step = self.state, self.state.step
        evaluating, saving = step % config.eval_every == 0, step % config.steps_per_checkpoint == 0
        logging = step == 1 or step % config.log_every == 0 or record.keys() & {"wrong", "slow_rank"}
        if logging or evaluating or saving:
            record = self._look() or record
        if self.clock.can_plan:
            record = {**record, **self._plan()}
        if "slow_rank" in record:
            slow, times = record["slow_rank"], record["times_median"]
            self.progress.note(
                f"step {step}: rank {slow} computes {times:.1f} times as long as the median of the ranks"
            )
        if logging:
            self.log.write(step=step, **record, **self._machine(), seconds=round(self.clock.seconds, 3))
        with self.clock.pause():
            if evaluating:
                self._evaluate()
            if saving or step in (state.best_step, state.best_ema_step):
                self._save()
        self.progress.show(self._figures(), important=evaluating or step == 1)

    def _evaluation(self) -> Evaluation:
        return self.objective.evaluate(self.eval_batch_size, self.config, self.autocast, self.device)

    def _evaluate(self) -> None:
        state, found = self.state, self._evaluation()
        self._found, self._evaluated = found, state.step
        if self.peak_flops < math.inf:
            self.peak_flops = peak_flops(self.dtype, self.device, again=True)
        best = None if state.best_val_loss is None else Evaluation(state.best_val_loss, state.best_metric)
        state.stale += 1
        if best is None or found.rank > best.rank:
            state.best_val_loss, state.best_metric, state.best_step = found.loss, found.metric, state.step
            state.stale = 0
        self._log(found)
        if self.average is not None:
            self._evaluate_average(self.average)

    def _evaluate_average(self, average: WeightAverage) -> None:
        with average.in_the_network():
            found, best = Evaluation(self._evaluation().loss), self.state.best_ema_loss
        if best is None or found.rank > Evaluation(best).rank:
            self.state.best_ema_loss, self.state.best_ema_step = found.loss, self.state.step
        self.log.write(step=self.state.step, ema_val_loss=found.loss)

    def _plan(self) -> dict[str, int]:
        """Set planned_steps from the time that is left."""
        steps = self.state.step + self.clock.more_steps()
        self.state.planned_steps = steps if self.config.max_steps is None else min(steps, self.config.max_steps)
        return {"planned_steps": self.state.planned_steps}
