"""Measured points in a file of JSON Lines, each written as soon as it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gptfast._files import atomic_write, read_bytes

FIELDS = {"parameters": int, "tokens": int, "flops": (int, float), "loss": (int, float), "seconds": (int, float)}


class Points:
    """The points in the file at `path`. A last line that was cut short, as by a kill, is taken out of the file.

    Raises:
        ValueError: another line is no point; it is named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if not path.exists() or not path.stat().st_size:
            return
        content = read_bytes(path)
        lines = content.split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            self.rows.append(_point(line, path, number))
        if lines[-1]:
            atomic_write(path, content[: len(content) - len(lines[-1])])

    def add(self, point: dict[str, Any]) -> None:
        """Write a point, through to the disk."""
        with self.path.open("ab") as file:
            file.write((json.dumps(point) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(point)

    def find(self, parameters: int, tokens: int) -> dict[str, Any] | None:
        """The point of a size and a number of tokens."""
        wanted = (parameters, tokens)
        return next((row for row in self.rows if (row["parameters"], row["tokens"]) == wanted), None)


def _point(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not all(
        isinstance(row.get(name), kind) and not isinstance(row[name], bool) and row[name] > 0
        for name, kind in FIELDS.items()
    ):
        raise ValueError(
            f"{path}: line {number} is no point, {line[:60].decode(errors='replace')!r}; expected an object with numbers above 0 in "
            f"{', '.join(FIELDS)} - remove the line, and resume"
        )
    return row
