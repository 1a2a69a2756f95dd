"""Trains the runs of a ladder, one after another, and keeps what is measured."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gptfast._files import absolute, atomic_write
from gptfast._json import expect, field, read_json
from gptfast._options import values_of
from gptfast.data import PreparedData, open_data
from gptfast.ladder.options import LadderOptions
from gptfast.ladder.plan import Plan, Run, heads_of, learning_rate, make_plan
from gptfast.ladder.points import Points
from gptfast.ladder.speed import step_seconds
from gptfast.models import GPT, GPTConfig
from gptfast.training.config import TrainConfig
from gptfast.training.fingerprint import fingerprint
from gptfast.training.resuming import refuse_changes
from gptfast.training.run_data import same_data
from gptfast.training.run_folder import lock_run
from gptfast.training.trainer import Trainer

EVALUATED = 1 << 16  # tokens of the validation text that a loss is the mean of
PLAN, TRAINING = "ladder.json", "training"  # in the folder of a ladder: its plan, and the training that runs
_DATA = ("data", "tokenizer", "vocab_size", "glob", "text_field")
_DEFAULTS = {"data": "shakespeare", "tokenizer": "char"}
_FREE = ("out", "resume")


class Ladder:
    """The trainings of a ladder.

    Args:
        given: the options that were given, by the names of the fields of `LadderOptions` and `DataOptions`. With resume those of
            the ladder stand for the others.
        note: takes a line about what is done.
    Raises:
        FileExistsError: the folder has a ladder, and it is not to be resumed.  FileNotFoundError: there is none to resume.
        ValueError: options or data that are not those of the ladder; too small a budget.
        BlockingIOError: another process trains there.
    """

    def __init__(self, given: Mapping[str, Any], note: Callable[[str], None] = lambda line: None) -> None:
        started = time.monotonic()
        place = LadderOptions(**values_of(LadderOptions, given))
        self.out, self.note = place.out, note
        self.interrupted: int | None = None  # the signal that ended the work early
        if place.resume and not self.out.is_dir():
            raise FileNotFoundError(
                f"scaling: there is no folder {self.out}; leave `resume` out to begin a ladder there"
            )
        lock = lock_run(self.out)
        try:
            self._open(given, place, started)
        except BaseException:
            shutil.rmtree(self.out / TRAINING, ignore_errors=True)
            lock.release()
            raise
        self._lock = lock

    def _open(self, given: Mapping[str, Any], place: LadderOptions, started: float) -> None:
        self.points, self.predicted = Points(self.out / "points.jsonl"), Points(self.out / "prediction.jsonl")
        stored = read_json(self.out / PLAN) if (self.out / PLAN).exists() else None
        if stored is not None and not place.resume:
            raise FileExistsError(
                f"scaling: {self.out} has a ladder already; continue it with `resume`, or choose another `out`"
            )
        if stored is None and self.points.rows:
            raise FileExistsError(
                f"scaling: {self.points.path} has points, but there is no {self.out / PLAN} that says what they are of; choose another `out`"
            )
        chosen = {name: value for name, value in given.items() if name not in _FREE}
        if "data" in chosen:
            chosen["data"] = absolute(chosen["data"])
        if stored is not None:
            chosen = self._same(chosen, field(stored, "options", dict, self.out / PLAN))
        self.chosen = {**_DEFAULTS, **chosen}
        self.options = LadderOptions(
            **{**values_of(LadderOptions, self.chosen), "out": place.out, "resume": place.resume}
        )
        if stored is None:
            self.data = self._data(self.out / "data")
            self.plan, self.setup = self._planned(started)
            value = {
                "options": self.chosen,
                "marks": fingerprint(self.data),
                "setup": self.setup,
                "runs": list(map(asdict, self.plan.runs)),
            }
            value["predicted"] = asdict(self.plan.predicted)
            atomic_write(self.out / PLAN, (json.dumps(value, indent=2) + "\n").encode())
            return
        data = same_data(self.chosen["data"], self.out, field(stored, "marks", dict, self.out / PLAN), self._data)
        if data is None:
            raise ValueError(
                f"scaling: the data is not what the points in {self.out} were measured on; resume with the same data"
            )
        self.data = data
        runs = [_run_of(row, self.out / PLAN) for row in field(stored, "runs", list, self.out / PLAN)]
        self.plan = Plan(tuple(runs), _run_of(field(stored, "predicted", dict, self.out / PLAN), self.out / PLAN))
        self.setup = float(field(stored, "setup", float, self.out / PLAN))

    def _data(self, folder: Path, overwrite: bool = True) -> PreparedData:
        """The data of the ladder, with its tokens in `folder`."""
        others = {name: self.chosen[name] for name in _DATA[2:] if name in self.chosen}
        return open_data(self.chosen["data"], folder, self.chosen["tokenizer"], overwrite=overwrite, **others)

    def _same(self, given: Mapping[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
        """The options of the ladder; those that are given must be the same."""
        full = {**vars(LadderOptions()), **_DEFAULTS, **stored}
        refuse_changes("scaling", given, full, (), f"the ladder in {self.out}", "choose another `out`")
        return stored

    def _planned(self, started: float) -> tuple[Plan, float]:
        """The plan, and the seconds that it took to make it."""
        options, rows = self.options, self.options.batch_size
        evaluation = min(EVALUATED, len(self.data.val)) / (3 * rows * options.block_size)

        @cache
        def seconds(n_layer: int, n_embd: int) -> float:
            return step_seconds(self._config(n_layer, n_embd), rows, options.device)

        self.note("measuring the speed of this machine")
        for _ in range(2):  # the first time much is imported and measured that later trainings find done
            begin = time.monotonic()
            self._train(Run(2, 16, 0, 2, 2 * rows * options.block_size, 0.0))
            if self.interrupted is not None:
                raise KeyboardInterrupt
        overhead = max(0.0, time.monotonic() - begin - (evaluation + 2) * seconds(2, 16))
        spent = time.monotonic() - started
        step, text = rows * options.block_size, len(self.data.train)
        plan = make_plan(options.seconds, spent, overhead, seconds, self._parameters, step, evaluation, text)
        return plan, time.monotonic() - started

    def _config(self, n_layer: int, n_embd: int) -> GPTConfig:
        return GPTConfig(
            n_layer=n_layer,
            n_head=heads_of(n_embd),
            n_embd=n_embd,
            block_size=self.options.block_size,
            vocab_size=self.data.tokenizer.vocab_size,
            dropout=0.0,
        )

    def _parameters(self, n_layer: int, n_embd: int) -> int:
        with torch.device("meta"):
            return GPT(self._config(n_layer, n_embd)).num_parameters() - self.options.block_size * n_embd

    def train(self) -> None:
        """Train what is not measured yet, as far as the budget goes; at the end the size that is predicted.

        Raises:
            RuntimeError: a loss that is not finite.  OSError: a file cannot be written.
        """
        try:
            for number, run in enumerate(self.plan.runs, 1):
                if self.points.find(run.parameters, run.tokens) is None:
                    if self.spent + self.slowness * (run.seconds + self.plan.predicted.seconds) > self.options.seconds:
                        continue  # see `dropped`
                    self._measure(run, self.points, f"{number}/{len(self.plan.runs)}")
                if self.interrupted is not None:
                    return
            if not self.predicted.rows:
                self._measure(self.to_predict(), self.predicted, "the predicted size")
        finally:
            shutil.rmtree(self.out / TRAINING, ignore_errors=True)
            self._lock.release()

    @property
    def spent(self) -> float:
        """Seconds of the plan and of all measured points."""
        return self.setup + sum(row["seconds"] for row in [*self.points.rows, *self.predicted.rows])

    @property
    def slowness(self) -> float:
        """The time that the points took by what was planned for them; at least 1."""
        planned = {(run.parameters, run.tokens): run.seconds for run in self.plan.runs}
        known = [(row["seconds"], planned.get((row["parameters"], row["tokens"]))) for row in self.points.rows]
        took, expected = (sum(column) for column in zip(*((a, b) for a, b in known if b), (0.0, 0.0), strict=True))
        return max(1.0, took / expected) if expected else 1.0

    @property
    def dropped(self) -> list[Run]:
        """Runs of the plan that were not trained, because the machine was slower than it was measured to be."""
        return [run for run in self.plan.runs if self.points.find(run.parameters, run.tokens) is None]

    def to_predict(self) -> Run:
        """The run whose loss is predicted: as it was, or with the steps that there is time for, no fewer than the shortest run has."""
        run = self.plan.predicted
        if self.predicted.rows:
            return replace(run, tokens=self.predicted.rows[0]["tokens"])
        left = (self.options.seconds - self.spent) / (self.slowness * run.seconds)
        least = min(run.steps for run in self.plan.runs)
        steps = max(min(run.steps, int(run.steps * left)), least)
        return replace(run, steps=steps, tokens=steps * (run.tokens // run.steps))

    def _measure(self, run: Run, points: Points, which: str) -> None:
        begin = time.monotonic()
        loss = self._train(run)
        if loss is None:
            return
        point = {"parameters": run.parameters, "tokens": run.tokens, "flops": run.flops, "loss": loss}
        shape = {"n_layer": run.n_layer, "n_embd": run.n_embd, "learning_rate": learning_rate(run.n_embd)}
        points.add(point | {"seconds": round(time.monotonic() - begin, 3)} | shape)
        self.note(f"{which}: {run.parameters:,} parameters, {run.tokens:,} tokens: loss {loss:.4f}")

    def _train(self, run: Run) -> float | None:
        """The validation loss after a training; None where a signal ended it early. One that came later ends the work, too."""
        options = self.options
        config = TrainConfig(
            batch_size=options.batch_size,
            max_steps=run.steps,
            learning_rate=learning_rate(run.n_embd),
            eval_every=run.steps,
            eval_batches=max(1, EVALUATED // (options.batch_size * options.block_size)),
            log_every=max(1, run.steps // 20),
            seed=options.seed,
            device=options.device,
        )
        torch.manual_seed(options.seed)
        model = GPT(self._config(run.n_layer, run.n_embd))
        data, out = self.data, self.out / TRAINING
        trainer = Trainer(model, data.train, data.val, config, out, overwrite=True, progress=False)
        result = trainer.train()
        self.interrupted = result.signal
        if result.interrupted is not None:
            return None
        return float("nan") if result.val_loss is None else result.val_loss


def _run_of(row: Any, path: Path) -> Run:
    expect(row, dict, "a run", path)
    kinds = {"n_layer": int, "n_embd": int, "parameters": int, "steps": int, "tokens": int, "seconds": float}
    return Run(**{name: field(row, name, kind, path) for name, kind in kinds.items()})
