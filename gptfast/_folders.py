"""Several files of a folder replaced together: a kill or a full disk leaves all old or all new."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGE, COMMITTED, STALE = ".saving", ".saved", ".stale"
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"


@contextmanager
def staged_folder(folder: str | os.PathLike[str], replaces: str = WEIGHTS) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, the files written there replace those in `folder`.

    Other files of `folder` stay as they are. The block's files are flushed to the disk, the stage is renamed
    (this is the moment that counts), and its files are moved into place. A save that was killed after that
    moment is completed by the next `finish_staged`, which every reader calls first. One writer at a time.

    Args:
        folder: made if it is missing.
        replaces: regular expression; files in `folder` with such a name that the block does not write are
            removed, so that a model in one file is not left beside the shards of the one before.
    Raises:
        OSError: a file cannot be written; what was in `folder` is intact.
    """
    target = Path(os.path.realpath(folder))  # through links
    stage = target / STAGE
    try:
        target.mkdir(parents=True, exist_ok=True)
        finish_staged(target)
        shutil.rmtree(stage, ignore_errors=True)  # of a save that was killed
        stage.mkdir()
        yield stage
        _commit(stage, target, replaces)
    except OSError as error:
        raise _explain(error, folder) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # gone already when all went well
    finish_staged(target)


def _commit(stage: Path, target: Path, replaces: str) -> None:
    written = {file.name for file in stage.iterdir()}
    stale = [f.name for f in target.iterdir() if re.fullmatch(replaces, f.name) and f.name not in written]
    (stage / STALE).write_text(json.dumps(stale), encoding="utf-8")
    for file in stage.iterdir():
        _sync(file)
    _sync(stage)
    os.rename(stage, target / COMMITTED)
    _sync(target)


def finish_staged(folder: str | os.PathLike[str]) -> None:
    """Move the files of a completed save into place, if a kill came between; to be called before reading."""
    folder = Path(os.path.realpath(folder))
    committed = folder / COMMITTED
    if not committed.is_dir():
        return
    stale = committed / STALE
    if stale.exists():
        for name in json.loads(stale.read_text(encoding="utf-8")):
            (folder / name).unlink(missing_ok=True)
    for file in committed.iterdir():
        if file.name != STALE:
            os.replace(file, folder / file.name)
    _sync(folder)
    shutil.rmtree(committed)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, folder: str | os.PathLike[str]) -> OSError:
    """The error with a text that names the folder, the reason and the remedy (once, if stages are nested)."""
    if error.errno is None or error.strerror != os.strerror(error.errno):
        return error
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space (a save needs room for the old and the new files)" if full else "check the path"
    text = f"cannot write to {folder}: {error.strerror}; what was there is intact - {remedy} and save again"
    return OSError(error.errno, text)
