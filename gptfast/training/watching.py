"""A run seen from outside, while it trains and afterwards: its log and the newest checkpoint's trainer.json are read."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptfast._locks import holder
from gptfast._snapshots import current, read_whole
from gptfast.training.checkpoint import Checkpoint, read_trainer
from gptfast.training.checksums import TRAINER
from gptfast.training.log import read_log
from gptfast.training.run_folder import LOCK

State = Literal["starting", "running", "complete", "stopped", "killed"]
_RECENT = 20  # records over which the speed is averaged
_AGAIN = 0.2  # seconds until a log is read again whose last line was being written
_TIME = 0.9  # part of max_minutes from which on a run that ended after an evaluation has used its time
_ALARMS = ("wrong", "slow_rank", "rewound_from")


@dataclass(frozen=True)
class Watched:
    """A run as its files show it.

    out: RUN.  state, words: what it does, and that in a sentence.
    records: of the log, one a step.  checkpoint: RUN/last's, None before the first.
    planned: the last step; None: not known (yet).
    """

    out: Path
    state: State
    words: str
    records: list[dict[str, Any]]
    checkpoint: Checkpoint | None
    planned: int | None

    @property
    def step(self) -> int:
        """The newest step that is known."""
        saved = 0 if self.checkpoint is None else self.checkpoint.state.step
        return max([saved, *(record["step"] for record in self.records[-1:])])

    def newest(self, name: str) -> Any:
        """The newest value of a key of the log; None: there is none."""
        return next((record[name] for record in reversed(self.records) if name in record), None)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a key of the log."""
        return [(r["step"], r[name]) for r in self.records if isinstance(r.get(name), (int, float))]

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation by loss; None before the first."""
        return min(self.curve("val_loss"), key=lambda point: point[1], default=None)

    @property
    def seconds_a_step(self) -> float | None:
        """Of the last steps, evaluations and checkpoints included; None: not known."""
        times = [(r["step"], r["seconds"]) for r in self.records[-_RECENT:] if "seconds" in r]
        if len(times) < 2 or times[-1][0] <= times[0][0] or times[-1][1] <= times[0][1]:
            return None
        return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the present speed; None: not running, or not known."""
        each = self.seconds_a_step
        if self.state != "running" or each is None or self.planned is None:
            return None
        return max(0, self.planned - self.step) * each

    @property
    def alarms(self) -> list[tuple[int, str]]:
        """(step, text) of the steps that went wrong, the newest last."""
        return [(r["step"], _alarm(r)) for r in self.records if any(name in r for name in _ALARMS)]


def _alarm(record: dict[str, Any]) -> str:
    if "slow_rank" in record and "wrong" not in record:
        return f"rank {record['slow_rank']} computes {record.get('times_median', 0):.1f} times as long as the median"
    if "rewound_from" in record:
        return f"{record.get('wrong', 'a step went wrong')}; went back from step {record['rewound_from']}"
    done = f"; {record['done']}" if record.get("done", "trained") != "trained" else ""
    return f"{record.get('wrong')}{done}"


def watch_run(out: str | os.PathLike[str]) -> Watched:
    """Look at a run of `gptfast train` or `gptfast finetune`. Nothing in the folder is changed or locked.

    Args:
        out: RUN, the folder that the run writes.
    Raises:
        FileNotFoundError: there is no such folder (yet), or no run in it.
        NotADirectoryError: a file.
        ValueError: the log or trainer.json is damaged.
    """
    out = Path(out)
    held = holder(out / LOCK)
    _check(out, held is not None)
    records = _records(out / "log.jsonl")
    last = out / "last"
    checkpoint = None
    if current(last, TRAINER).exists():
        checkpoint = read_whole(last, lambda: read_trainer(last))
    seen = Watched(out, "running", "", records, checkpoint, _planned(records, checkpoint))
    if held is None:
        state, words = _ended(seen)
    elif held[1]:
        state = "running" if records else "starting"
        words = f"{state} ({held[0]})"
    else:
        state, words = "killed", f"killed: {held[0]} no longer exists; {_back_to(seen)}"
    return Watched(out, state, words, records, checkpoint, seen.planned)


def _check(out: Path, held: bool) -> None:
    if not out.exists():
        raise FileNotFoundError(
            f"there is no folder {out} (yet); start a run with gptfast train --out {out}, or wait for one with `wait`"
        )
    if not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; expected the folder of a run, which has a log.jsonl")
    if held or (out / "log.jsonl").exists():
        return
    if current(out, TRAINER).exists():
        raise FileNotFoundError(f"{out} is a checkpoint of a run; watch the run itself: {out.resolve().parent}")
    runs = sorted(path.parent.name for path in out.glob("*/log.jsonl"))
    if runs:
        raise FileNotFoundError(f"{out} is no run but has some; watch one: {', '.join(str(out / r) for r in runs[:8])}")
    kind = "a model" if (out / "config.json").exists() else "of another kind"
    raise FileNotFoundError(
        f"{out} is {kind}: it has no log.jsonl, which gptfast train and gptfast finetune write; name the folder given to "
        "them as `out`"
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """The log's records; read twice where it is being written just now."""
    try:
        return read_log(path)
    except ValueError:
        time.sleep(_AGAIN)
        return read_log(path)


def _planned(records: list[dict[str, Any]], checkpoint: Checkpoint | None) -> int | None:
    logged = next((r["planned_steps"] for r in reversed(records) if "planned_steps" in r), None)
    if logged is not None:
        return logged
    step = records[-1]["step"] if records else 0
    if checkpoint is None:
        return None
    planned = checkpoint.state.planned_steps
    return planned if planned is not None and planned >= step else None  # continued with more steps than were planned


def _ended(seen: Watched) -> tuple[State, str]:
    """State and words of a run that nobody trains."""
    if seen.checkpoint is None:
        return "stopped", "ended before its first checkpoint; start it again with `overwrite`"
    state, config = seen.checkpoint.state, seen.checkpoint.config
    if seen.step > state.step:  # continued, and ended without a checkpoint
        return "stopped", f"stopped early; {_back_to(seen)}"
    if state.planned_steps is not None and state.step >= state.planned_steps:
        return "complete", f"complete: all {state.step:,} steps are made"
    if config.patience is not None and state.stale >= config.patience:
        return "complete", f"complete: {state.stale} evaluations without a better one"
    minutes = config.max_minutes
    if minutes is not None and state.evaluated == state.step and state.seconds >= _TIME * 60 * minutes:
        return "complete", f"complete: its {minutes:g} minutes are used, after {state.step:,} steps"
    return "stopped", f"stopped early; {_back_to(seen)}"


def _back_to(seen: Watched) -> str:
    if seen.checkpoint is None:
        return "it has no checkpoint yet; start it again with `overwrite`"
    lost = seen.step - seen.checkpoint.state.step
    behind = f", {lost:,} steps before the end of the log" if lost > 0 else ""
    return f"continue from step {seen.checkpoint.state.step:,}{behind} with `resume`"
