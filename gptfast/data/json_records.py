"""Records of JSON: an object on each line, or one list of them. Both are read as a stream."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptfast._files import check_beginning, not_utf8
from gptfast._json import check_value, parse, unique_keys

_MARK = b"\xef\xbb\xbf"  # byte order mark of UTF-8
_BLANK = 1 << 12  # bytes within which a JSON list begins
_CHUNK = 1 << 20  # characters of a JSON list per read
_LONGEST_WORD = 16  # characters; JSON is invalid where these are cut: true, \ud83d\ude00


def json_values(file: BinaryIO, path: Path, unique: bool = False) -> Iterator[tuple[int, str, Any]]:
    """Number, place and value of the records of a file with one value per line, or one list of values; see `parse`.

    Raises:
        ValueError: another encoding or a packed file, or a record that is no JSON. The message names the line or the record.
    """
    beginning = cast(Any, file).peek(_BLANK)
    check_beginning(path, beginning)
    if beginning.removeprefix(_MARK).lstrip().startswith(b"["):
        for number, value in enumerate(_List(file, path, unique).values(), start=1):
            yield number, f"{path}, record {number}", value
        return
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(_MARK) if number == 1 else line
        if line.strip():
            where = f"{path}, line {number}"
            text = decoded(line, where, path)
            try:
                value = parse(text, where, unique)
            except ValueError:
                if why := _otherwise(text.strip(), file):
                    raise ValueError(f"{where} {why}") from None
                raise
            yield number, where, value


def decoded(line: bytes, where: str, path: Path) -> str:
    """The text of a line. Raises ValueError where it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where, path, error) from error


def _otherwise(line: str, rest: BinaryIO) -> str:
    """What a line is that is no JSON, and what to do; "" where it looks damaged."""
    if line.endswith(","):
        try:
            json.loads(line[:-1])
        except ValueError:
            pass
        else:
            return (
                "ends with a comma; expected one object a line and nothing between them - remove the commas, or put [ before "
                "the first object and ] behind the last one"
            )
    if line.startswith("{'"):
        return "is written as Python's dict; expected JSON, with double quotes - write it with json.dumps"
    if line.endswith(("{", "[", ",")) and any(more.strip() for more in rest):
        return "does not end its object; expected one object a line, or one list of objects - `jq -c .` puts each on a line"
    return ""


class _List:
    """A JSON list in a file, read as a stream."""

    def __init__(self, file: BinaryIO, path: Path, unique: bool = False) -> None:
        self._source, self._path = io.TextIOWrapper(file, "utf-8-sig"), path
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_keys if unique else None)

    def values(self) -> Iterator[Any]:
        with self._source:
            yield from self._values()

    def _values(self) -> Iterator[Any]:
        self._take("[")
        if self._next() != "]":
            for number in itertools.count(1):
                where = f"{self._path}, record {number}"
                yield self._value(where)
                if self._next() == "]":
                    break
                self._take(",", f" behind record {number}")
                if self._next() == "]":
                    raise ValueError(f"{where} has a comma behind it, and is the last one; remove the comma")
        self._take("]")
        if (self._text[self._place :] + self._source.read(_CHUNK)).strip():
            raise ValueError(f"{self._path} has text after its list; expected one list, or one object per line")

    def _next(self) -> str:
        """The next character that is not a blank."""
        while True:
            while self._place < len(self._text):
                if not self._text[self._place].isspace():
                    return self._text[self._place]
                self._place += 1
            if not self._fill(_CHUNK):
                raise self._cut_short()

    def _take(self, character: str, where: str = "") -> None:
        if self._next() != character:
            raise ValueError(
                f"{self._path}: {self._next()!r} where {character!r} is expected{where}; it is not a JSON list"
            )
        self._place += 1

    def _value(self, where: str) -> Any:
        size = _CHUNK
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except RecursionError:
                raise ValueError(f"{where} is nested too deeply") from None
            except json.JSONDecodeError as error:
                rest = self._text[error.pos :].rstrip()
                if self._may_go_on(error) and self._fill(size):
                    size *= 2
                    continue
                if error.msg.startswith("Unterminated string") or not rest:
                    raise self._cut_short() from None
                raise ValueError(f"{where} is not valid JSON ({error.msg} at {rest[:20]!r}); correct it") from None
            except ValueError as error:  # a key twice, thousands of digits
                raise ValueError(f"{where} is not valid JSON ({error})") from None
            value = check_value(value, self._text[self._place : end], where)
            self._place = end
            return value

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether a value can be invalid only because more of the file has to be read."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_WORD

    def _fill(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        more = self._source.read(size)
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)

    def _cut_short(self) -> ValueError:
        return ValueError(f"{self._path} is damaged or cut short: its JSON list has no end")
