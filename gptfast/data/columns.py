"""Files of columns, read by pyarrow: Parquet and Arrow (IPC files and streams). A few rows are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    def check(schema: Any) -> None:
        _check_once(schema, field, path)
        kind = str(schema.field(field).type)
        if "string" not in kind or not kind.startswith(("string", "large_string", "dictionary<values=")):
            raise ValueError(f"{path}: the field {field!r} is of type {kind}; expected string; {listed(schema.names)}")

    with _damage_named(path):
        texts = (text for rows in _batches(path, check, [field]) for text in rows.column(field).to_pylist())
        yield from enumerate(texts, start=1)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the values of each row, by field.

    Raises:
        OSError, ImportError: as `read_columns`.  ValueError: the file is damaged, or has a field twice.
    """

    def check(schema: Any) -> None:
        for field in schema.names:
            _check_once(schema, field, path)

    with _damage_named(path):
        yield from enumerate((row for rows in _batches(path, check) for row in rows.to_pylist()), start=1)


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


def _batches(path: Path, check: Callable[[Any], None], fields: list[str] | None = None) -> Iterator[Any]:
    """The rows, a few at a time, with these fields at least. check: of the schema, before anything is read."""
    open_read(path).close()  # its errors name the file
    is_parquet = PurePath(path.name.lower()).suffix == ".parquet"
    yield from _parquet(path, check, fields) if is_parquet else _arrow(path, check)


def _parquet(path: Path, check: Callable[[Any], None], fields: list[str] | None) -> Iterator[Any]:
    with pyarrow("pyarrow.parquet", path).ParquetFile(path, pre_buffer=False) as file:
        check(file.schema_arrow)
        for group in range(file.num_row_groups):
            yield from file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=fields)


def _arrow(path: Path, check: Callable[[Any], None]) -> Iterator[Any]:
    """A file has an index of its batches, a stream (what `datasets` saves) is read to its end."""
    ipc = pyarrow("pyarrow.ipc", path)
    with open_read(path) as file:
        is_file = file.read(len(_FILE)) == _FILE
    with pyarrow("pyarrow", path).OSFile(str(path)) as source:  # a mapped file would stay in memory as it is read
        reader = (ipc.open_file if is_file else ipc.open_stream)(source)
        check(reader.schema)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.slice(start, _ROWS)


def _check_once(schema: Any, field: str, path: Path) -> None:
    if schema.names.count(field) != 1:
        problem = "no field" if field not in schema.names else "more than one field"
        raise ValueError(f"{path}: there is {problem} {field!r}; {listed(schema.names)}")
