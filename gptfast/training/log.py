"""The training log RUN/log.jsonl: one JSON object per line, one line per step; other programs may get its numbers too."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from gptfast._files import atomic_write, remedy_of
from gptfast._json import field, parse
from gptfast.training.boards import Board


class Log:
    """Appends records to a JSON Lines file.

    Args:
        path: the file.
        step: the step of the checkpoint that the run continues from, 0 for a new run. Records of later steps, and an
            incomplete last line, are removed.
        boards: get the numbers of every record too; closed with the log.
    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], step: int = 0, boards: Sequence[Board] = ()) -> None:
        self.path, self._boards = Path(path), boards
        self._file = self._rewritten(read_log(self.path) if step else [], step)

    def write(self, **record: Any) -> None:
        """Write a record with the key "step"; it is in the file when this returns.

        A record of the last one's step is joined with it: its line gets longer.
        """
        last = self.records[-1] if self.records else None
        again = last is not None and last["step"] == record["step"]
        whole = {**last, **record} if last is not None and again else record
        line = (json.dumps(whole) + "\n").encode()
        try:
            if again:
                self._file.seek(self._last)
            else:
                self._last = self._file.tell()
            while line:  # a part may have found room: the next call says why there is no more
                line = line[self._file.write(line) :]
            if again:
                self._file.truncate()
        except OSError as error:
            remedy = remedy_of(error) or "free some space"
            text = f"cannot write {self.path}: {error.strerror}; {remedy} and continue the run with `resume`"
            raise OSError(error.errno, text) from error
        self.records[-1 if again else len(self.records) :] = [whole]
        values = {name: x for name, x in _numbers(record).items() if name != "step"}
        for board in self._boards:
            board.write(record["step"], values)

    def _rewritten(self, records: list[dict[str, Any]], step: int) -> FileIO:
        """The file with the records up to a step, opened behind the last one."""
        self.records = _joined(record for record in records if record["step"] <= step)
        lines = [(json.dumps(record) + "\n").encode() for record in self.records]
        atomic_write(self.path, b"".join(lines))
        file = self.path.open("r+b", buffering=0)  # every record is written at once
        self._last = file.seek(0, os.SEEK_END) - (len(lines[-1]) if lines else 0)
        return file

    def back_to(self, step: int) -> None:
        """Remove the records of later steps."""
        self._file.close()
        self._file = self._rewritten(self.records, step)
        for board in self._boards:
            board.back_to(step)

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name; those of a list have their place in it, as in "expert_load/0/3"."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            found |= _numbers({f"{name}/{n}": part for n, part in enumerate(value)})
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value
    return found


def _joined(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each step; older logs have several."""
    found: list[dict[str, Any]] = []
    for record in records:
        if found and found[-1]["step"] == record["step"]:
            found[-1] = {**found[-1], **record}
        else:
            found.append(record)
    return found


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
