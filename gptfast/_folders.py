"""Folders whose files mean something together: a save replaces all of them or none, and a reader sees one save.

A save goes through three names in its folder, so that the folder stays plain for everybody who opens files by name:

    .saving   the new files, while they are written; a kill leaves it behind, and nothing reads it
    .saved    the same folder under its second name: the rename is the moment from which the new files count
    (none)    the files are moved to their places one by one, and .saved is removed

Readers change nothing: `_snapshots` finds the last save in either place. The next save completes the moves of a killed
one. Files are replaced and never changed, so that what somebody has open stays what it was.

Why not exchange two whole folders (RENAME_EXCHANGE)?  A reader that opens files by name would still mix two saves, the
user's own files beside ours would have to be moved too, and some file systems cannot do it. Readers that know nothing
of .saved (transformers) can meet a mixture between two neighbouring renames, and after a kill in that place until the
next save; nothing short of another name for each save prevents that.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptfast._files import remedy_of
from gptfast._locks import FileLock, courtesy, holder
from gptfast._snapshots import COMMITTED, STALE, WEIGHTS, is_file, is_folder, is_ours, stale_names
from gptfast._warn import warn

STAGE, LOCK = ".saving", ".saving.lock"
_WAIT = 600.0  # seconds for another save into the same folder
_stages: set[Path] = set()  # of this process, being filled


def holds_more(folder: Path) -> bool:
    """Is there anything in a folder but a first save that a kill ended before it counted?"""
    return folder.exists() and (not folder.is_dir() or any(x.name not in (STAGE, LOCK) for x in folder.iterdir()))


@contextmanager
def staged_folder(folder: str | os.PathLike[str], replaces: str = WEIGHTS) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, the files written there replace those in `folder`.

    Other files of `folder` stay as they are. Savers into one folder take turns, also those of other processes. Inside
    the block of another save, that one's folder is yielded: its files and these are then replaced together.

    Args:
        folder: made if it is missing; a failure leaves none that was not there.
        replaces: regular expression, part of `_snapshots.EVERYTHING`; files in `folder` with such a name that the
            block does not write are removed, so that a model in one file is not left beside the shards of the one
            before.
    Raises:
        OSError: a file cannot be written; what was in `folder` is intact.  BlockingIOError: another process saves
            there and does not come to an end.
    """
    target = Path(os.path.realpath(folder))  # through links
    if target in _stages:
        yield target
        return
    lock, new = FileLock(target / LOCK), not target.exists()
    try:
        with explained(folder):
            target.mkdir(parents=True, exist_ok=True)
            _wait_for(lock, folder)
            _finish(target)
            stage = _empty_stage(target)
        try:
            with explained(folder):
                _stages.add(stage)
                yield stage
                written = _commit(stage, target, replaces)
        finally:
            _stages.discard(stage)
            shutil.rmtree(stage, ignore_errors=True)  # gone already when all went well
        with explained(folder, f"the new files are safe in {COMMITTED}, from where gptfast reads them"):
            _finish(target, written)
    finally:
        lock.release()
        if new:
            with suppress(OSError):  # what a failure leaves is empty; what a save leaves is not
                target.rmdir()


def destination(folder: str | os.PathLike[str]) -> Path:
    """Where the files that are written to a folder will be: inside the block of a save, the folder that it is for."""
    target = Path(os.path.realpath(folder))
    return target.parent if target in _stages else target


def is_saved_by_another(folder: str | os.PathLike[str]) -> bool:
    """Whether a process that lives is saving there."""
    found = holder(Path(os.path.realpath(folder)) / LOCK)
    return found is not None and found[1]


def _wait_for(lock: FileLock, folder: str | os.PathLike[str]) -> None:
    other = lock.acquire(_WAIT)
    if other is not None:
        raise BlockingIOError(
            f"{folder}: {other} saves there and has not come to an end in {_WAIT:.0f} s; wait for it, or end it and "
            f"remove {lock.path}"
        )


def _empty_stage(target: Path) -> Path:
    """A new folder for the files to come; what a killed save left in that place is removed."""
    stage = target / STAGE
    if is_folder(stage):
        for file in stage.iterdir():
            if is_file(file) and (is_ours(file.name) or file.name == STALE):
                file.unlink()
    if os.path.lexists(stage):
        _remove(stage)
    stage.mkdir()
    return stage


def _commit(stage: Path, target: Path, replaces: str) -> frozenset[str]:
    """Make the files of the stage those that count; their names."""
    written = frozenset(file.name for file in stage.iterdir())
    for name in sorted(written):
        if not is_file(stage / name) or is_folder(target / name):
            raise IsADirectoryError(f"cannot write {target / name}: a folder is in its place; move it and save again")
    stale = [f.name for f in target.iterdir() if re.fullmatch(replaces, f.name) and f.name not in written]
    (stage / STALE).write_text(json.dumps(list(filter(is_ours, stale))), encoding="utf-8")
    for file in stage.iterdir():
        sync(file)
    sync(stage)
    with courtesy(target, alone=True):
        os.rename(stage, target / COMMITTED)
    sync(target)
    return written


def _finish(target: Path, written: frozenset[str] = frozenset()) -> None:
    """Move the files of a committed save to their places.

    Args:
        written: the names of our own save. From one that was killed, or that somebody else put there, only what
            gptfast saves replaces a file.
    """
    committed = target / COMMITTED
    if not os.path.lexists(committed):
        return
    stale = stale_names(committed)
    if stale is not None:
        files = [file for file in committed.iterdir() if is_file(file) and file.name != STALE]
        for file in sorted(files, key=_order):
            place = target / file.name
            if is_ours(file.name) or file.name in written or not os.path.lexists(place):
                os.replace(file, place)
        for name in stale:
            if not is_folder(target / name):
                (target / name).unlink(missing_ok=True)
        sync(target)
        (committed / STALE).unlink()
    _remove(committed)


def _order(file: Path) -> tuple[int, str]:
    """Shards before the index that names them, and a single file last: others find no index without its shards."""
    if re.fullmatch(r"model-\d+-of-\d+\.safetensors", file.name):
        return 0, file.name
    return (2 if file.name == "model.safetensors" else 1), file.name


def _remove(folder: Path) -> None:
    """Remove an empty folder; a link, a file or a folder with something else in it is no work of a save, and is kept."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        places = (folder.with_name(f"{folder.name}.unknown{n}") for n in range(1, 10**6))
        aside = next(place for place in places if not os.path.lexists(place))
        os.rename(folder, aside)
        warn(f"{folder} is not what a save leaves there; it is kept as {aside.name}")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(folder: str | os.PathLike[str], state: str = "what was there is intact") -> Iterator[None]:
    """OSErrors leave with a text that names the folder, the reason and the remedy (once, if saves are nested)."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror != os.strerror(error.errno):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space (a save needs room for the old and the new files) and save again" if full else None
        remedy = remedy or remedy_of(error) or "check the path and save again"
        text = f"cannot write to {folder}: {error.strerror}; {state} - {remedy}"
        raise OSError(error.errno, text) from error
