"""Files of records with a text field: JSON Lines, JSON lists, CSV, Parquet and Arrow. All are read as a stream."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO, cast

from gptfast._files import decoded_blocks, open_read
from gptfast._json import parse, short, unique_keys
from gptfast.data.columns import COLUMNS, Record, listed, pyarrow, read_columns

JSON, CSV = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
RECORDS = (*JSON, *CSV, *COLUMNS)
PACKED = (".gz", ".bz2", ".xz", ".zst")
_MARK = b"\xef\xbb\xbf"  # byte order mark of UTF-8
_BLANK = 1 << 12  # bytes within which a JSON list begins
_CHUNK = 1 << 20  # characters of a JSON list per read
_LONGEST_WORD = 16  # characters; JSON is invalid where these are cut: true, \ud83d\ude00
_LONGEST_VALUE = 2**31 - 1  # characters of CSV; the library's own limit is 131072


def kind_of(name: str) -> tuple[str, str]:
    """The suffixes of a file's format and of its compression in lower case, such as (".jsonl", ".gz"); "" for none."""
    path = PurePath(name.lower())
    if path.suffix in PACKED:
        return PurePath(path.stem).suffix, path.suffix
    return path.suffix, ""


def read_records(path: Path, field: str) -> Iterator[Record]:
    """The text in `field` of each record.

    Raises:
        OSError: the file cannot be read.
        ImportError: the file needs pyarrow.
        ValueError: the file is damaged or not UTF-8, or a record has no such field, or the field is not text. The message
            names the line and the fields.
    """
    kind, packed = kind_of(path.name)
    if kind in COLUMNS:
        if packed:
            name = COLUMNS[kind]
            raise ValueError(f"{path} is a compressed {name} file; {name} is compressed inside - unpack it first")
        yield from read_columns(path, field)
        return
    with _unpacked(path) as file:
        yield from (_read_csv if kind in CSV else _read_json)(file, path, field)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON Lines, or of one JSON list; each after its place, "FILE, line N" or "FILE, record N".

    Raises:
        OSError: the file cannot be read.
        ValueError: another kind of file, a damaged line, or one that is no object or has a key twice. The message names the line.
    """
    if kind_of(path.name)[0] not in JSON:
        raise ValueError(f"{path}: expected a file of JSON Lines, whose name ends in {', '.join(JSON)}")
    with _unpacked(path) as file:
        for _, where, value in _json_values(file, path, unique=True):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: the record is {short(value)}; expected an object")
            yield where, value


def unpacked_text(path: Path) -> Iterator[str]:
    """The text of a packed file in blocks, so that it need not fit in memory.

    Raises:
        OSError, ImportError, ValueError: as `read_records`.
    """
    with _unpacked(path) as file:
        yield from decoded_blocks(file, path)


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    packed = kind_of(path.name)[1]
    with open_read(path) as raw:
        try:
            yield _opener(packed, raw, path)
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); write it again") from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"{path} is damaged or no {packed} file ({error}); write it again") from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); convert it with iconv"
            ) from error


def _opener(packed: str, raw: BinaryIO, path: Path) -> BinaryIO:
    if packed == ".zst":
        stream = pyarrow("pyarrow", path).CompressedInputStream(raw, "zstd")
        return cast(BinaryIO, io.BufferedReader(stream))
    modules: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    return modules[packed].open(raw) if packed else raw


def _read_json(file: BinaryIO, path: Path, field: str) -> Iterator[Record]:
    for number, where, value in _json_values(file, path):
        yield number, _text(value, field, where)


def _json_values(file: BinaryIO, path: Path, unique: bool = False) -> Iterator[tuple[int, str, Any]]:
    """Number, place and value of the records of a file with one value per line, or one list of values; see `parse`."""
    beginning = cast(Any, file).peek(_BLANK).removeprefix(_MARK).lstrip()
    if beginning.startswith(b"["):
        for number, value in enumerate(_List(file, path, unique).values(), start=1):
            yield number, f"{path}, record {number}", value
        return
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(_MARK) if number == 1 else line
        if line.strip():
            where = f"{path}, line {number}"
            yield number, where, parse(_decoded(line, where), where, unique)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start}: {error.reason}); convert the file with iconv"
        ) from error


def _text(record: Any, field: str, where: str) -> str | None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: the record is {short(record)}; expected an object with the field {field!r}")
    if field not in record:
        raise ValueError(f"{where}: there is no field {field!r}; {listed(list(record))}")
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: the field {field!r} is {short(value)}; expected a text; {listed(list(record))}")
    return value


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
                yield self._value(f"{self._path}, record {number}")
                if self._next() == "]":
                    break
                self._take(",")
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
            self._fill(_CHUNK)

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise ValueError(f"{self._path}: {self._next()!r} where {character!r} is expected; it is not a JSON list")
        self._place += 1

    def _value(self, where: str) -> Any:
        size = _CHUNK
        self._next()
        while True:
            try:
                value, self._place = self._decoder.raw_decode(self._text, self._place)
                return value
            except RecursionError:
                raise ValueError(f"{where} is nested too deeply") from None
            except ValueError as error:
                if not self._may_go_on(error):
                    raise ValueError(f"{where} is not valid JSON ({error})") from None
            self._fill(size)
            size *= 2

    def _may_go_on(self, error: ValueError) -> bool:
        """Whether a value can be invalid only because more of the file has to be read."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_WORD

    def _fill(self, size: int) -> None:
        more = self._source.read(size)
        if not more:
            raise ValueError(f"{self._path} is damaged or cut short: its JSON list has no end")
        self._text, self._place = self._text[self._place :] + more, 0


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Record]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as source:
        yield from _csv_records(source, path, field)


def _csv_records(source: TextIO, path: Path, field: str) -> Iterator[Record]:
    first = source.readline()
    rows = csv.reader(itertools.chain([first], source), delimiter=_delimiter(first, field, path), strict=True)
    limit = csv.field_size_limit(_LONGEST_VALUE)
    try:
        names = next(rows, [])
        if names.count(field) != 1:
            problem = "no field" if field not in names else "more than one field"
            raise ValueError(f"{path}, line 1: there is {problem} {field!r}; {listed(names)}")
        column = names.index(field)
        for row in rows:
            if row and len(row) != len(names):
                raise ValueError(
                    f"{path}, line {rows.line_num}: the record has {len(row)} values; expected {len(names)}, as line 1 has"
                )
            if row:
                yield rows.line_num, row[column]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {rows.line_num}: {error}; expected CSV with quotes doubled inside quotes"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _delimiter(header: str, field: str, path: Path) -> str:
    """The delimiter with which line 1 has the field, else the usual one of the format."""
    usual = "\t" if kind_of(path.name)[0] == ".tsv" else ","
    fitting = [d for d in (usual, ",", ";", "\t", "|") if field in next(csv.reader([header], delimiter=d), [])]
    return next(iter(fitting), usual)
