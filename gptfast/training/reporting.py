"""The log of a run and its figures while it trains: speed, share of the machine's limit, memory and temperature."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from gptfast.training.boards import open_board
from gptfast.training.config import TrainConfig
from gptfast.training.log import Log, NoLog
from gptfast.training.objective import Evaluation, Objective
from gptfast.training.progress import Figures
from gptfast.training.ranks import Ranks
from gptfast.training.sensors import machine_figures
from gptfast.training.timing import RunClock
from gptfast.training.train_state import TrainState


class Reporting:
    """The part of `Loop` that tells how it goes; its attributes are set there."""

    objective: Objective
    config: TrainConfig
    out: Path
    state: TrainState
    log: Log | NoLog
    device: torch.device
    clock: RunClock
    ranks: Ranks | None
    peak_flops: float
    _is_main: bool
    _evaluated: int
    _rows: int
    _loss: float
    _found: Evaluation | None

    def _open_log(self, names: set[str | None]) -> Log | NoLog:
        """The log, and the programs of these names that draw it; on rank 0."""
        if not self._is_main:
            return NoLog()
        boards = [open_board(str(name), self.out, self.state.step, asdict(self.config)) for name in names]
        return Log(self.out / "log.jsonl", self.state.step, boards)

    def _log(self, found: Evaluation) -> None:
        named = {} if found.metric is None else {self.objective.metric: found.metric}
        self.log.write(step=self.state.step, val_loss=found.loss, **named, **found.figures)

    def _tokens_per_second(self) -> float | None:
        seconds = self.clock.step_seconds
        return None if seconds is None else self._rows * self.objective.tokens_per_row / seconds

    def _machine(self) -> dict[str, float]:
        """Speed, memory and temperature, for the log; what is not known is left out."""
        if not self._is_main:
            return {}
        speed, share = self._tokens_per_second(), self._share_of_peak()
        figures = {} if speed is None else {"tokens_per_second": round(speed, 1)}
        return {**figures, **({} if share is None else {"mfu": round(share, 4)}), **machine_figures(self.device)}

    def _share_of_peak(self) -> float | None:
        """Flops of the model over those that the machine can do at most, in (0, 1]; None: not known.

        None too where the peak is too small, because it was measured while the machine was busy.
        """
        speed, per_token = self._tokens_per_second(), self.objective.flops_per_token()
        if speed is None or per_token is None:
            return None
        share = speed * per_token / (self.peak_flops * (1 if self.ranks is None else self.ranks.size))
        return share if 0 < share <= 1 else None

    def _figures(self) -> Figures:
        step, planned, speed = self.state.step, self.state.planned_steps, self._tokens_per_second()
        found, share = self._found, self._share_of_peak()
        metric = "" if found is None or found.metric is None else f"{self.objective.metric} {found.metric:.3f}"
        if found is not None and found.figures:
            right = {name: x for name, x in found.figures.items() if name.endswith("_accuracy")}
            metric = "  ".join(
                f"{name.removeprefix('val_').removesuffix('_accuracy')} {x:.1%}" for name, x in right.items()
            )
        return Figures(
            step=step,
            total=planned,
            loss=self._loss,
            val_loss=None if found is None else found.loss,
            metric=metric,
            val_is_new=self._evaluated == step,
            tokens_per_second=speed,
            percent_of_peak=None if share is None else 100 * share,
            seconds_left=None if speed is None or planned is None else (planned - step) * self.clock.seconds_per_step(),
        )
