"""The folder of a run: its lock, and the checkpoints of a run that is replaced."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptfast._folders import holds_more
from gptfast._locks import FileLock
from gptfast.training.kept import kept
from gptfast.training.plot import EXPERTS

LOCK = "training.lock"
_FIGURES = (EXPERTS, "loss.png", "confusion.png", "metrics.json")  # of a run that has ended


def lock_run(out: Path) -> FileLock:
    """The acquired lock of a run's folder, which is created if missing. The caller releases it.

    Raises:
        BlockingIOError: another process trains in the folder.
        OSError: the folder cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, and a run is kept in a folder; choose another `out`")
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    holder = lock.acquire(wait=0.5)
    if holder is not None:
        raise BlockingIOError(
            f"{out} is being trained by {holder}; wait for it, end it, or choose another `out` (if that process no "
            f"longer exists, remove {lock.path})"
        )
    return lock


@contextmanager
def locked_run(out: Path) -> Iterator[FileLock]:
    """The lock of a run. Where the block fails it is released, and a folder that was made for it is removed."""
    made, lock = not out.exists(), None
    try:
        lock = lock_run(out)
        yield lock
    except BaseException:
        if lock is not None:
            lock.release()
        if made:
            with suppress(OSError):  # something was written there
                out.rmdir()
        raise


def check_room(out: Path, overwrite: bool) -> list[Path]:
    """The checkpoints of a run that is to be replaced. Raises FileExistsError: there are some and `overwrite` is False."""
    old = [*(out / name for name in ("last", "best", "best-ema") if holds_more(out / name)), *kept(out)]
    if old and not overwrite:
        raise FileExistsError(
            f"{out} already has a training run; continue it with `resume`, replace it with `overwrite`, or "
            "choose another `out`"
        )
    return old


def make_room(out: Path, overwrite: bool) -> None:
    """Delete the checkpoints of a run that is to be replaced, and the figures that its successor has not yet, or may never have.

    Raises:
        FileExistsError: there are checkpoints and `overwrite` is False.
    """
    for folder in check_room(out, overwrite):
        shutil.rmtree(folder)
        for name in _FIGURES:
            (out / name).unlink(missing_ok=True)
