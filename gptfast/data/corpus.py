"""Corpora: what `--data` names as a stream of documents, which can be read several times."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gptfast._files import read_asset
from gptfast._warn import warn
from gptfast.data.documents import Document
from gptfast.data.folder import choose_files
from gptfast.data.hf_folder import dataset_files, field_names, is_dataset
from gptfast.data.records import PACKED, RECORDS, kind_of, read_records, unpacked_text
from gptfast.data.spool import Held, Slice, Spool
from gptfast.data.token_file import is_token_file

GENRES = ("comedy", "history", "tragedy", "poetry")


@dataclass(frozen=True)
class Records:
    """A file of records, each a document.

    name: of the file in the corpus; a document adds the record's number.
    """

    name: str
    path: Path
    field: str

    def __iter__(self) -> Iterator[Document]:
        """A document for each record; a record without text gives one of size 0."""
        for number, text in read_records(self.path, self.field):
            text = text or ""
            try:
                content = (text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text).encode()
            except UnicodeEncodeError as error:
                half = text[error.start]
                raise ValueError(
                    f"{self.path}, line or record {number} holds {half!r}, half of a surrogate pair"
                ) from None
            yield Document(f"{self.name}:{number}", Slice(Held(content), 0, len(content)))


class Corpus:
    """The documents that data names. Texts are read from their files each time; one is in memory at a time.

    Args:
        data: as the user named it.
        sources: documents, and files of records, in order.
        notes: sentences for the user about files that are left out.
        held: the number of sources, the last ones, that are for validation because the data says so; 0: it does not.
    """

    def __init__(
        self, data: str, sources: Sequence[Document | Records], notes: Sequence[str] = (), held: int = 0
    ) -> None:
        self.data, self._sources, self._notes, self._held = data, list(sources), list(notes), held
        self._empty = 0  # records without text, at the last reading

    @property
    def is_split(self) -> bool:
        """Whether the data itself says what is for validation."""
        return self._held > 0

    @property
    def is_cheap_to_keep(self) -> bool:
        """Whether documents are names of files, or texts that are in memory anyway."""
        return not any(isinstance(source, Records) for source in self._sources)

    @property
    def size(self) -> int:
        """Bytes of the files and texts: what there is to read, about."""
        return sum(s.path.stat().st_size if isinstance(s, Records) else s.size for s in self._sources)

    def stream(self) -> Iterator[tuple[bool, Document]]:
        """(whether the data says that it is for validation, document), in order.

        Raises:
            OSError, ImportError, ValueError: as `gptfast.data.load_documents`.
        """
        self._empty, found = 0, False
        for n, source in enumerate(self._sources):
            held = n >= len(self._sources) - self._held
            for document in source if isinstance(source, Records) else (source,):
                if isinstance(source, Document) or document.size:
                    found = True
                    yield held, document
                else:
                    self._empty += 1
        if not found:
            raise ValueError(f"load_documents: {self.data} has no text: {'; '.join(self.notes) or 'it has no records'}")

    @property
    def documents(self) -> list[Document]:
        """All documents; the texts of records are then in a temporary file in TMPDIR."""
        spool = Spool()
        return [
            Document(d.name, spool.add(d.source.blocks(1 << 20)))
            if isinstance(d.source, Slice) and isinstance(d.source.spool, Held)
            else d
            for _, d in self.stream()
        ]

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about files and records that are left out; records are known when they have been read."""
        n = self._empty
        return [*self._notes, *([f"{n:,} record{'s' if n > 1 else ''} without text skipped"] if n else [])]


def load_documents(
    data: str | os.PathLike[str], *, glob: str | Sequence[str] | None = None, text_field: str | None = None
) -> list[Document]:
    """The documents that `data` names.

    Args:
        data: "shakespeare" (42 plays and poems that the package ships), "shakespeare:comedy,poetry" (some
            genres), a text file (one document), a file of records (each is a document), a folder of `save_to_disk` of
            Hugging Face's `datasets` (a dataset, or a dictionary of splits), or another folder, searched recursively.
        glob: patterns of the files to read in a folder, such as "*.md" or ["*.txt", "*.md"], regardless of case. None: .txt
            files or, with `text_field`, files of records.
        text_field: the field that holds the text of a record, in .jsonl, .ndjson, .json (a list, or an object per line),
            .csv, .tsv (line 1 names the fields), .parquet and .arrow, .ipc, .feather (Arrow's files and streams; these and
            .parquet need pyarrow). Records whose text is empty or null are left out. None: files are plain text.

    Files packed with gzip, bzip2, xz or zstd (needs pyarrow) are unpacked. Records and unpacked texts are stored in a
    temporary file in TMPDIR.

    Raises:
        FileNotFoundError: no such file or folder.
        OSError, ImportError: a file cannot be read.
        ValueError: an unknown genre, a folder without matching files, a file of tokens, a record without the field, or an
            option that does not apply to `data`.
    """
    return load_corpus(data, glob, text_field).documents


def load_corpus(
    data: str | os.PathLike[str], glob: str | Sequence[str] | None = None, text_field: str | None = None
) -> Corpus:
    """The corpus that `data` names; arguments as in `load_documents`. Its records are read when it is streamed."""
    patterns = [glob] if isinstance(glob, str) else list(glob or ())
    path = Path(data)
    known = path.exists() or str(data).startswith("shakespeare")
    if patterns and known and not path.is_dir():
        raise ValueError(
            f"load_documents: glob is {', '.join(map(repr, patterns))}, but {data} is no folder; leave it out"
        )
    name, _, genres = str(data).partition(":")
    if name == "shakespeare":
        if text_field is not None:
            raise ValueError(f"load_documents: text_field is {text_field!r}, but {data} has no fields; leave it out")
        return Corpus(str(data), _shakespeare([genre.strip() for genre in genres.split(",")] if genres else GENRES))
    if path.is_dir() and not patterns and is_dataset(path):
        return _dataset(path, text_field)
    if path.is_dir():
        files, notes = choose_files(path, patterns, text_field is not None)
    elif path.exists():
        files, notes = {path.name: path}, []
    else:
        raise FileNotFoundError(
            f"load_documents: {str(data)!r} is neither 'shakespeare' nor an existing file or folder; check "
            "the spelling of the path"
        )
    return Corpus(str(data), _sources(data, files, text_field), notes)


def _dataset(folder: Path, text_field: str | None) -> Corpus:
    if text_field is None:
        names = ", ".join(map(repr, field_names(folder)))
        raise ValueError(
            f"load_documents: {folder} is a dataset of Hugging Face; name the field that holds the text with text_field "
            f"(--text-field on the command line){f': {names}' if names else ''}"
        )
    parts, notes = dataset_files(folder)
    sources = [Records(name, path, text_field) for files in parts.values() for name, path in files.items()]
    return Corpus(str(folder), sources, notes, len(parts.get("val", ())))


def _sources(data: str | os.PathLike[str], files: dict[str, Path], text_field: str | None) -> list[Document | Records]:
    sources: list[Document | Records] = []
    spool = Spool()
    records = {name for name in files if kind_of(name)[0] in RECORDS}
    if text_field is not None and not records:
        raise ValueError(
            f"load_documents: text_field is {text_field!r}, but {data} is no file of records; expected {', '.join(RECORDS)} - "
            "leave it out, or give the file such a name"
        )
    if text_field is None and records:
        warn(
            f"{min(records)} is read as plain text, with its field names and punctuation; name the field that holds the text "
            "with text_field (--text-field on the command line)",
        )
    for name, path in files.items():
        if is_token_file(path):
            raise ValueError(f"load_documents: {path} holds tokens, not text; pass it to `gptfast train --data`")
        if name in records and text_field is not None:
            sources.append(Records(name, path, text_field))
        elif kind_of(name)[1] in PACKED:
            sources.append(Document(name, spool.add(unpacked_text(path))))
        else:
            sources.append(Document(name, path))
    return sources


@cache
def _plays() -> dict[str, dict[str, str]]:
    return json.loads(read_asset("shakespeare.json"))


def _shakespeare(genres: Sequence[str]) -> list[Document]:
    unknown = [genre for genre in genres if genre not in GENRES]
    if unknown:
        raise ValueError(f"load_documents: genre is {unknown[0]!r}; expected some of {', '.join(GENRES)}")
    return [Document(name, play["text"]) for name, play in _plays().items() if play["genre"] in genres]
