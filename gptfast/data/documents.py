"""Documents: the texts to train on, and their split into training and validation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from gptfast._files import open_read, read_asset, text_blocks
from gptfast._warn import warn
from gptfast.data.folder import choose_files
from gptfast.data.records import PACKED, RECORDS, kind_of, read_records, unpacked_text
from gptfast.data.spool import Slice, Spool
from gptfast.data.token_file import is_token_file
from gptfast.tokenizer.pieces import BLOCK, blocks_of

GENRES = ("comedy", "history", "tragedy", "poetry")


@dataclass(frozen=True)
class Document:
    """A named text. The text of a file is read on demand, so that neither a document nor a corpus must fit in memory.

    name: unique in a corpus.
    source: the text, the path of its file, or its slice of a temporary file.
    start, stop: of a part of a file: the range of its bytes; stop None: to the end.
    """

    name: str
    source: str | Path | Slice
    start: int = 0
    stop: int | None = None

    @property
    def text(self) -> str:
        """The text. Raises OSError or ValueError for a file that is missing, empty, binary or not UTF-8."""
        return "".join(self.blocks())

    def blocks(self, size: int = BLOCK) -> Iterator[str]:
        """The text in blocks of about `size` characters, read one by one. Raises as `text`."""
        if isinstance(self.source, str):
            return blocks_of(self.source, size)
        if isinstance(self.source, Slice):
            return self.source.blocks(size)
        return text_blocks(self.source, self.start, self.stop, size)

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        if isinstance(self.source, str):
            return len(self.source.encode())
        if isinstance(self.source, Slice):
            return self.source.size
        return (self.source.stat().st_size if self.stop is None else self.stop) - self.start


@dataclass(frozen=True)
class Split:
    """Documents, divided into those to train on and those to validate on.

    train, val: the documents of each part.
    note: a sentence for the user that describes the split.
    """

    train: list[Document]
    val: list[Document]
    note: str


@dataclass(frozen=True)
class Corpus:
    """The documents that `data` names.

    documents: the texts.
    notes: sentences for the user about files and records that are left out.
    """

    documents: list[Document]
    notes: list[str]


def load_documents(
    data: str | os.PathLike[str], *, glob: str | Sequence[str] | None = None, text_field: str | None = None
) -> list[Document]:
    """The documents that `data` names.

    Args:
        data: "shakespeare" (42 plays and poems that the package ships), "shakespeare:comedy,poetry" (some
            genres), a text file (one document), a file of records (each is a document), or a folder, searched recursively.
        glob: patterns of the files to read in a folder, such as "*.md" or ["*.txt", "*.md"], regardless of case. None: .txt
            files or, with `text_field`, files of records.
        text_field: the field that holds the text of a record, in .jsonl, .ndjson, .json (a list, or an object per line),
            .csv, .tsv (line 1 names the fields) and .parquet (needs pyarrow). Records whose text is empty or null are left
            out. None: files are plain text.

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
    """The documents that `load_documents` returns, with notes for the user."""
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
        return Corpus(_shakespeare([genre.strip() for genre in genres.split(",")] if genres else GENRES), [])
    if path.is_dir():
        files, notes = choose_files(path, patterns, text_field is not None)
    elif path.exists():
        files, notes = {path.name: path}, []
    else:
        raise FileNotFoundError(
            f"load_documents: {str(data)!r} is neither 'shakespeare' nor an existing file or folder; check "
            "the spelling of the path"
        )
    return _read_files(data, files, text_field, notes)


def _read_files(
    data: str | os.PathLike[str], files: dict[str, Path], text_field: str | None, notes: list[str]
) -> Corpus:
    documents: list[Document] = []
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
    empty = 0
    for name, path in files.items():
        if is_token_file(path):
            raise ValueError(f"load_documents: {path} holds tokens, not text; pass it to `gptfast train --data`")
        if name in records and text_field is not None:
            before, count = len(documents), 0
            for document in _records(name, path, text_field, spool):
                count += 1
                if document.size:
                    documents.append(document)
            empty += count - (len(documents) - before)
        elif kind_of(name)[1] in PACKED:
            documents.append(Document(name, spool.add(unpacked_text(path))))
        else:
            documents.append(Document(name, path))
    if empty:
        notes.append(f"{empty:,} record{'s' if empty > 1 else ''} without text skipped")
    if not documents:
        raise ValueError(f"load_documents: {data} has no text: {'; '.join(notes) or 'it has no records'}")
    return Corpus(documents, notes)


def _records(name: str, path: Path, field: str, spool: Spool) -> Iterator[Document]:
    """A document for each record; a record without text gives one of size 0."""
    for number, text in read_records(path, field):
        text = text or ""
        try:
            kept = spool.add([text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text])
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ValueError(f"{path}, line or record {number} holds {half!r}, half of a surrogate pair") from None
        yield Document(f"{name}:{number}", kept)


def split_documents(documents: Sequence[Document], val_fraction: float = 0.1, seed: int = 0) -> Split:
    """Choose whole documents for validation, about `val_fraction` of the text.

    The choice depends only on `seed` and the name of each document, so adding a document does not reshuffle the
    others. Where no choice of whole documents comes within a factor of two of the fraction (one document, or
    a few large ones), the end of each document becomes validation text instead.

    Args:
        documents: at least one.
        val_fraction: part of the bytes of the text, in (0, 1).
        seed: any integer.
    Raises:
        ValueError: val_fraction out of range, no documents, or too little text to split.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"split_documents: val_fraction is {val_fraction}; expected 0 < val_fraction < 1")
    if not documents:
        raise ValueError("split_documents: documents is empty; expected at least one document")
    total = sum(document.size for document in documents)
    chosen = _choose(documents, val_fraction * total, seed)
    size = sum(document.size for document in chosen)
    if size == 0 or not val_fraction * total / 2 <= size <= val_fraction * total * 2:
        return _split_ends(documents, val_fraction)
    names = {document.name for document in chosen}
    listed = ", ".join(document.name for document in chosen[:6]) + (", …" if len(chosen) > 6 else "")
    part = f"{len(chosen)} of {len(documents)} documents, {size / total:.1%} of the text"
    train = [document for document in documents if document.name not in names]
    return Split(train, chosen, f"validation: {part} ({listed})")


@cache
def _plays() -> dict[str, dict[str, str]]:
    return json.loads(read_asset("shakespeare.json"))


def _shakespeare(genres: Sequence[str]) -> list[Document]:
    unknown = [genre for genre in genres if genre not in GENRES]
    if unknown:
        raise ValueError(f"load_documents: genre is {unknown[0]!r}; expected some of {', '.join(GENRES)}")
    return [Document(name, play["text"]) for name, play in _plays().items() if play["genre"] in genres]


def _choose(documents: Sequence[Document], target: float, seed: int) -> list[Document]:
    """Documents of about `target` bytes: in the order of a keyed hash, each that brings the total nearer to it."""
    chosen, size = [], 0
    for document in sorted(documents, key=lambda document: _hash(seed, document.name)):
        if len(chosen) < len(documents) - 1 and abs(size + document.size - target) < abs(size - target):
            chosen.append(document)
            size += document.size
    return chosen


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()


def _split_ends(documents: Sequence[Document], val_fraction: float) -> Split:
    train, val = [], []
    for document in documents:
        divide = _divide_text if isinstance(document.source, str) else _divide_file
        for part, documents_of_part in zip(divide(document, val_fraction), (train, val), strict=True):
            documents_of_part.append(part)
    if not all(document.size for document in train + val):
        for document in documents:
            if document.size < 100:
                "".join(document.blocks())  # raises where it is not text
        raise ValueError(
            f"split_documents: {documents[0].name} and the like are too short for a validation part of {val_fraction:.0%}; "
            "add text"
        )
    of = "the text" if len(documents) == 1 else f"each of {len(documents)} documents"
    return Split(train, val, f"validation: the last {val_fraction:.0%} of {of}")


def _divide_text(document: Document, val_fraction: float) -> tuple[Document, Document]:
    """The two parts of a text, cut at the end of a line if one is near."""
    text = str(document.source)
    cut = round(len(text) * (1 - val_fraction))
    cut = text.rfind("\n", cut - cut // 20, cut) + 1 or cut
    return Document(document.name, text[:cut]), Document(document.name, text[cut:])


def _divide_file(document: Document, val_fraction: float) -> tuple[Document, Document]:
    """The two parts of a file or slice, counted in bytes, without reading all of it."""
    source, size = document.source, document.size
    if not size:
        raise ValueError(f"{source} is empty (0 bytes); expected a file with content")
    cut = round(size * (1 - val_fraction))
    reach = cut // 20
    low = max(0, cut - max(reach, 4))  # a character has at most 4 bytes
    if isinstance(source, Slice):
        near = source.part(low, min(cut + 1, size)).content
    else:
        with open_read(str(source)) as file:
            file.seek(document.start + low)
            near = file.read(cut - low + 1)
    cut -= low
    cut = near.rfind(b"\n", cut - min(reach, cut), cut) + 1 or cut
    while cut > 0 and (_continues(near[cut:]) or near[cut - 1 : cut + 1] == b"\r\n"):
        cut -= 1
    cut += low
    if isinstance(source, Slice):
        return replace(document, source=source.part(0, cut)), replace(document, source=source.part(cut, size))
    cut += document.start
    return replace(document, stop=cut), replace(document, start=cut, stop=document.start + size)


def _continues(content: bytes) -> bool:
    """Whether the first byte continues a character of UTF-8."""
    return content[:1] != b"" and content[0] & 0xC0 == 0x80
