"""Files of columns, read by pyarrow: Parquet and Arrow (IPC files and streams). A few rows are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

from gptfast._files import open_read

COLUMNS = {".parquet": "Parquet", ".arrow": "Arrow", ".ipc": "Arrow", ".feather": "Arrow"}
_ROWS = 1024  # at once
_FILE = b"ARROW1"  # begins an IPC file; a stream begins with its schema

Record = tuple[int, "str | None"]  # the line, or the number in files without lines; the text, None where it is null


def read_columns(path: Path, field: str) -> Iterator[Record]:
    """The text in `field` of each row.

    Raises:
        OSError: the file cannot be read.  ImportError: pyarrow is missing.
        ValueError: the file is damaged, or has no such field, or the field is not text. The message names the fields.
    """
    open_read(path).close()  # its errors name the file
    read = _parquet if PurePath(path.name.lower()).suffix == ".parquet" else _arrow
    number = 0
    with _damage_named(path):
        for column in read(path, field):
            for text in column.to_pylist():
                number += 1
                yield number, text


def pyarrow(module: str, path: Path) -> Any:
    """A module of pyarrow, which reads `path`. Raises ImportError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"to read {path} a package is needed that is not installed: pip install 'gptfast-kernels[data]' (or pyarrow)"
        ) from error


def listed(names: list[str]) -> str:
    """The fields of a record, for messages."""
    return f"the fields are {', '.join(map(repr, names[:20]))}" + (", …" if len(names) > 20 else "")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    arrow = pyarrow("pyarrow", path)
    try:
        yield
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        name = COLUMNS[path.suffix.lower()]
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged or no {name} file ({reason}); write it again") from error


def _parquet(path: Path, field: str) -> Iterator[Any]:
    with pyarrow("pyarrow.parquet", path).ParquetFile(path, pre_buffer=False) as file:
        _check_field(file.schema_arrow, field, path)
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[field]):
                yield batch.column(0)


def _arrow(path: Path, field: str) -> Iterator[Any]:
    """The column in pieces; a file has an index of its batches, a stream (what `datasets` saves) is read to its end."""
    ipc = pyarrow("pyarrow.ipc", path)
    with open_read(path) as file:
        is_file = file.read(len(_FILE)) == _FILE
    with pyarrow("pyarrow", path).OSFile(str(path)) as source:  # a mapped file would stay in memory as it is read
        reader = (ipc.open_file if is_file else ipc.open_stream)(source)
        _check_field(reader.schema, field, path)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            column = batch.column(reader.schema.get_field_index(field))
            for start in range(0, len(column), _ROWS):
                yield column.slice(start, _ROWS)


def _check_field(schema: Any, field: str, path: Path) -> None:
    if schema.names.count(field) != 1:
        problem = "no field" if field not in schema.names else "more than one field"
        raise ValueError(f"{path}: there is {problem} {field!r}; {listed(schema.names)}")
    kind = str(schema.field(field).type)
    if "string" not in kind or not kind.startswith(("string", "large_string", "dictionary<values=")):
        raise ValueError(f"{path}: the field {field!r} is of type {kind}; expected string; {listed(schema.names)}")
