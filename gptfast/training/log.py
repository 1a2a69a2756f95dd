"""The training log RUN/log.jsonl, one JSON object per line, optionally also written for TensorBoard."""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

from gptfast._files import atomic_write
from gptfast._json import field, parse


class Log:
    """Appends records to a JSON Lines file.

    Args:
        path: the file.
        step: the step of the checkpoint that the run continues from, 0 for a new run. Records of later steps, and an
            incomplete last line, are removed.
        tensorboard: folder for TensorBoard's event files; None: no event files.
    Raises:
        OSError: the file cannot be written.
        ImportError: tensorboard is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], step: int = 0, tensorboard: Path | None = None) -> None:
        self.path = Path(path)
        self._file = self._rewritten(read_log(self.path) if step else [], step)
        self._board = None if tensorboard is None else _summary_writer(tensorboard, step)

    def write(self, **record: Any) -> None:
        """Append a record with the key "step"; it is in the file when this returns."""
        self.records.append(record)
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            text = f"cannot write {self.path}: {error.strerror}; free some space and continue the run with `resume`"
            raise OSError(error.errno, text) from error
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def _rewritten(self, records: list[dict[str, Any]], step: int) -> FileIO:
        """The file with the records up to a step, opened to append."""
        self.records = [record for record in records if record["step"] <= step]
        atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in self.records).encode())
        return self.path.open("ab", buffering=0)  # every record is written at once

    def back_to(self, step: int) -> None:
        """Remove the records of later steps."""
        self._file.close()
        self._file = self._rewritten(self.records, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoLog:
    """The log of a rank that does not log."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, **record: Any) -> None:
        pass

    def back_to(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a log without an incomplete last line; [] if there is no log.

    Raises:
        ValueError: another line is not a record.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_record(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        record = parse(line, where)
        field(record, "step", int, where)
        for key in ("loss", "val_loss"):
            field(record, key, float, where, None)
    except ValueError as error:
        raise ValueError(f"{error}; it is not a record of a training log - repair or remove the line") from None
    return record


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("`tensorboard` needs a package that is not installed: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
