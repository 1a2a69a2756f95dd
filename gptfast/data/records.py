"""Files of records: JSON Lines, JSON lists, CSV, Parquet and Arrow. All are read as a stream."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from gptfast._files import check_beginning, decoded_blocks, open_read
from gptfast._json import short
from gptfast.data.columns import COLUMNS, Record, listed, pyarrow, read_columns, read_rows
from gptfast.data.json_records import decoded, json_values

JSON, CSV = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv")
RECORDS = (*JSON, *CSV, *COLUMNS)
PACKED = (".gz", ".bz2", ".xz", ".zst")
_BEGINNING = 8  # bytes, in which marks of other formats are looked for
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
    kind = kind_of(path.name)[0]
    if kind in COLUMNS:
        _check_unpacked(path)
        yield from read_columns(path, field)
        return
    with _unpacked(path) as file:
        yield from (_read_csv if kind in CSV else _read_json)(file, path, field)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file with all their fields, each after its place, "FILE, line N" or "FILE, record N".

    Values of CSV are texts; those of the others have the types that they have there.

    Raises:
        OSError: the file cannot be read.  ImportError: the file needs pyarrow.
        ValueError: another kind of file, a damaged line, or a record that is no object or has a field twice. The message names the
            line.
    """
    open_read(path).close()  # a missing file or a folder is said first
    kind = kind_of(path.name)[0]
    if kind in COLUMNS:
        _check_unpacked(path)
        for number, row in read_rows(path):
            yield f"{path}, record {number}", row
        return
    if kind not in RECORDS:
        raise ValueError(
            f"{path}: expected a file of records, whose name ends in {', '.join(RECORDS)}{f', not in {kind}' if kind else ''}; "
            "name it so if it is one"
        )
    with _unpacked(path) as file:
        yield from (_csv_objects if kind in CSV else _json_objects)(file, path)


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
        except UnicodeDecodeError:
            with open_read(path) as again:
                for number, line in enumerate(_opener(packed, again, path), start=1):
                    decoded(line, f"{path}, line {number}", path)
            raise


def _opener(packed: str, raw: BinaryIO, path: Path) -> BinaryIO:
    if packed == ".zst":
        stream = pyarrow("pyarrow", path).CompressedInputStream(raw, "zstd")
        return cast(BinaryIO, io.BufferedReader(stream))
    modules: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    return modules[packed].open(raw) if packed else raw


def _check_unpacked(path: Path) -> None:
    kind, packed = kind_of(path.name)
    if packed:
        name = COLUMNS[kind]
        raise ValueError(f"{path} is a compressed {name} file; {name} is compressed inside - unpack it first")


def _json_objects(file: BinaryIO, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for _, where, value in json_values(file, path, unique=True):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: the record is {short(value)}; expected an object")
        yield where, value


def _read_json(file: BinaryIO, path: Path, field: str) -> Iterator[Record]:
    for number, where, value in json_values(file, path):
        yield number, _text(value, field, where)


def _text(record: Any, field: str, where: str) -> str | None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: the record is {short(record)}; expected an object with the field {field!r}")
    if field not in record:
        raise ValueError(f"{where}: there is no field {field!r}; {listed(list(record))}")
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: the field {field!r} is {short(value)}; expected a text; {listed(list(record))}")
    return value


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Record]:
    """The texts in one field. The delimiter is the one with which the first line has it, else the usual one."""
    with closing(_csv_rows(file, path, lambda names: field in names, f", {field!r} among them")) as rows:
        first, names = next(rows)
        if names.count(field) != 1:
            problem = "no field" if field not in names else "more than one field"
            raise ValueError(f"{path}, line {first}: there is {problem} {field!r}; {listed(names)}")
        column = names.index(field)
        for number, row in rows:
            yield number, row[column]


def _csv_objects(file: BinaryIO, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Records with all fields. The delimiter is the one that divides the first line, else the usual one."""
    with closing(_csv_rows(file, path, lambda names: len(names) > 1)) as rows:
        first, names = next(rows)
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"{path}, line {first}: there is more than one field {name!r}; {listed(names)}")
        for number, row in rows:
            yield f"{path}, line {number}", dict(zip(names, row, strict=True))


def _csv_rows(
    file: BinaryIO, path: Path, fits: Callable[[list[str]], bool], expected: str = ""
) -> Generator[tuple[int, list[str]]]:
    """The line and the values of each record; first those of the line with the names.

    Args:
        fits: whether names are divided as they should be.
        expected: what the first line has, for the message about an empty file.
    """
    check_beginning(path, cast(Any, file).peek(_BEGINNING))
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as source:
        skipped = 0
        while (first := source.readline()) and not first.strip():
            skipped += 1
        if not first:
            raise ValueError(f"{path} is empty; expected a first line with the names of its fields{expected}")
        rows = csv.reader(itertools.chain([first], source), delimiter=_delimiter(first, fits, path), strict=True)
        limit = csv.field_size_limit(_LONGEST_VALUE)
        try:
            names = next(rows, [])
            yield skipped + 1, names
            for row in rows:
                if row and len(row) != len(names):
                    raise ValueError(
                        f"{path}, line {skipped + rows.line_num}: the record has {len(row)} values; expected {len(names)}, as line "
                        f"{skipped + 1} has"
                    )
                if row:
                    yield skipped + rows.line_num, row
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {skipped + rows.line_num}: {error}; expected CSV with quotes doubled inside quotes"
            ) from error
        finally:
            csv.field_size_limit(limit)


def _delimiter(header: str, fits: Callable[[list[str]], bool], path: Path) -> str:
    usual = "\t" if kind_of(path.name)[0] == ".tsv" else ","
    fitting = [d for d in (usual, ",", ";", "\t", "|") if fits(next(csv.reader([header], delimiter=d), []))]
    return next(iter(fitting), usual)
