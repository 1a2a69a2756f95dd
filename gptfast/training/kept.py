"""The checkpoints of a run beside RUN/last: the ones before it, RUN/step-N, and the choice of the newest that is intact."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from gptfast._json import read_json
from gptfast._snapshots import current
from gptfast.training.checkpoint import TRAINER, Checkpoint, OtherVersionError, copy_checkpoint, read_checkpoint

_NAME = re.compile(r"step-(\d+)")


def kept(out: Path) -> list[Path]:
    """The folders RUN/step-N, the newest first."""
    found = [(int(match[1]), path) for path in out.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def keep_last(out: Path, next_step: int) -> None:
    """Give RUN/last, which is about to be replaced, a second name with its step, unless its successor is of the same step."""
    step = _step(out / "last")
    if step >= 0 and step != next_step:
        copy_checkpoint(out / "last", out / f"step-{step:06d}")


def forget(out: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints, RUN/last being the first of them."""
    for folder in kept(out)[max(0, count - 1) :]:
        shutil.rmtree(folder)


def complete_best(checkpoint: Checkpoint, out: Path) -> None:
    """Make RUN/best of a checkpoint that is the best one: a kill may come between RUN/last and its copy."""
    state, best = checkpoint.state, out / "best"
    if 0 < state.best_step == state.step and checkpoint.folder != best and _step(best) != state.step:
        copy_checkpoint(checkpoint.folder, best)


def newest_intact(out: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint of a run whose checksums are right, and what is wrong with the newer ones.

    Raises:
        FileNotFoundError, ValueError: there is none; the text is about RUN/last.
    """
    others = [folder for folder in (*kept(out), out / "best") if folder.is_dir()]
    wrong: list[Exception] = []
    for folder in (out / "last", *sorted(others, key=_step, reverse=True)):
        try:
            return read_checkpoint(folder), [f"damaged checkpoint: {error}" for error in wrong]
        except OtherVersionError:
            raise  # nothing is wrong with it
        except (FileNotFoundError, ValueError) as error:
            wrong.append(error)
    if not others:
        raise wrong[0]
    names = ", ".join(folder.name for folder in others)
    raise ValueError(f"every checkpoint in {out} is damaged, {names} too: {wrong[0]}") from wrong[0]


def _step(folder: Path) -> int:
    """By trainer.json alone; -1 where it cannot be read."""
    try:
        raw = read_json(current(folder, TRAINER))
    except (OSError, ValueError):
        return -1
    state = raw.get("state") if isinstance(raw, dict) else None
    step = state.get("step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else -1
