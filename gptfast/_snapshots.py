"""Reading folders whose files mean something together, while others may save into them; `_folders` writes them.

Nothing here changes a folder. While a save is being moved to its place (see `_folders`), its file in .saved counts
instead of the one beside it, and a name in its list .stale counts as missing: what is read does not depend on how far
the moves have come, nor on whether they were killed. .saved is trusted as little as any file from elsewhere: plain files
with names that gptfast writes, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TypeVar

from gptfast._locks import courtesy

COMMITTED, STALE = ".saved", ".stale"
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
TOKENIZER = (
    r"(vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|(merges|vocab)\.txt|chat_template\.jinja"
)
TOKENS = r"data\.json|(train|val)(-\d+-of-\d+)?\.bin"
ADAPTER = r"adapter_config\.json|adapter_model\.(safetensors|bin)"
TASK = r"task_config\.json|special_tokens\.safetensors"
OPTIMIZER = (
    r"optimizer(-\d+-of-\d+)?\.safetensors|part-\d+\.safetensors|ema\.safetensors"  # a part is there while a save lasts
)
EVERYTHING = rf"{WEIGHTS}|{ADAPTER}|{TASK}|{TOKENIZER}|{TOKENS}|(generation_)?config\.json|trainer\.json|{OPTIMIZER}"
_PATIENCE = 30.0  # seconds for a moment between two saves

T = TypeVar("T")


def current(folder: str | os.PathLike[str], name: str) -> Path:
    """Path of the file `name` in a folder's last save; a path that does not exist if the save has no such file."""
    folder = Path(folder)
    committed = folder / COMMITTED
    if not is_ours(name) or (stale := stale_names(committed)) is None:
        return folder / name
    if name in stale or is_file(committed / name):
        return committed / name
    return folder / name


def current_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a folder's last save, by name."""
    folder = Path(os.path.realpath(folder))
    names = {name for name in (*_names(folder), *_names(folder / COMMITTED)) if is_ours(name)}
    found = (current(folder, name) for name in sorted(names))
    return [path for path in found if path.is_file()]


def read_whole(folder: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """Call `read` until all files that it opens in `folder` are of one save; return its result.

    Where another process saves meanwhile, `read` is called again. It opens files by `current`, and leaves long work
    with them to the time after: what is open stays what it is.

    Raises:
        OSError: no moment between two saves was found.  Whatever `read` raises about files that do not change.
    """
    end, first = time.monotonic() + _PATIENCE, True
    while first or time.monotonic() < end:
        with nullcontext() if first else courtesy(Path(folder), alone=False), _Moment(folder) as moment:
            first = False
            try:
                result = read()
            except (OSError, ValueError, LookupError, RuntimeError):
                # In this order: once the next save is committed, .saved may hold the same names again.
                if not (moment.is_moving() or moment.is_over()):
                    raise
                continue
            if not moment.is_over():
                return result
    raise OSError(f"{folder} is saved so often that no moment to read it was found in {_PATIENCE:.0f} s; try again")


class _Moment:
    """The time from one save of a folder to the next.

    Every save replaces a JSON file, so another file under the name of one, or another set of names, is another save.
    The files are held open, so that no new one can have their inode numbers.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.path.realpath(folder))
        self._waiting = _names(self.folder / COMMITTED)
        self._open = ExitStack()
        self._held: dict[str, os.stat_result | None] = {}
        for name in self._json_names():
            self._held[name] = self._hold(name)

    def __enter__(self) -> _Moment:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def is_over(self) -> bool:
        """Has another save been committed?"""
        if self._json_names() != set(self._held):
            return True
        for name, held in self._held.items():
            now = _stat(current(self.folder, name))
            if held is None or now is None or not os.path.samestat(held, now):
                return True
        return False

    def is_moving(self) -> bool:
        """Are files of the last save being moved to their places?"""
        return _names(self.folder / COMMITTED) != self._waiting

    def _json_names(self) -> set[str]:
        names = (*_names(self.folder), *_names(self.folder / COMMITTED))
        return {n for n in names if n.endswith(".json") and is_ours(n) and _stat(current(self.folder, n)) is not None}

    def _hold(self, name: str) -> os.stat_result | None:
        try:
            descriptor = os.open(current(self.folder, name), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError:  # gone, or not to be read: `read` will say so
            return _stat(current(self.folder, name))
        self._open.callback(os.close, descriptor)
        return os.fstat(descriptor)


def stale_names(committed: Path) -> frozenset[str] | None:
    """The names in a save's folder that count as missing; None if no save wrote the folder, whose files then do not count."""
    try:
        if not is_folder(committed) or not is_file(committed / STALE):
            return None
        stale = json.loads((committed / STALE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(stale, list) or not all(isinstance(name, str) and is_ours(name) for name in stale):
        return None
    return frozenset(stale)


def is_ours(name: str) -> bool:
    return re.fullmatch(EVERYTHING, name) is not None


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder)) if is_folder(folder) else frozenset()
    except OSError:
        return frozenset()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def is_file(path: Path) -> bool:
    return _has_type(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    return _has_type(path, stat.S_ISDIR)


def _has_type(path: Path, test: Callable[[int], bool]) -> bool:
    """Of the path itself, not of what a link leads to."""
    try:
        return test(os.lstat(path).st_mode)
    except OSError:
        return False
