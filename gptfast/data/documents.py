"""Where text comes from, and which part of it is kept for validation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gptfast._files import read_asset, read_text
from gptfast.data.token_file import is_token_file

GENRES = ("comedy", "history", "tragedy", "poetry")


@dataclass(frozen=True)
class Document:
    """A text with a name. That of a file is read when it is asked for, so a corpus need not fit in memory."""

    name: str
    source: str | Path  # the text itself, or the file that holds it

    @property
    def text(self) -> str:
        """The text. Raises OSError or ValueError for a file that is missing, empty, binary or not UTF-8."""
        return self.source if isinstance(self.source, str) else read_text(self.source)

    @property
    def size(self) -> int:
        """Bytes of UTF-8: what the split and the progress bar count."""
        return len(self.source.encode()) if isinstance(self.source, str) else self.source.stat().st_size


@dataclass(frozen=True)
class Split:
    """train, val: the documents of each part; note: a sentence that says what was done."""

    train: list[Document]
    val: list[Document]
    note: str


def load_documents(data: str | os.PathLike[str]) -> list[Document]:
    """The documents that `data` names.

    Args:
        data: "shakespeare" (42 plays and poems that the package ships), "shakespeare:comedy,poetry" (some
            genres), a text file (one document), or a folder whose .txt files, also in folders below, are one
            document each.
    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: an unknown genre, a folder without .txt files, or a file of tokens.
    """
    name, _, genres = str(data).partition(":")
    if name == "shakespeare":
        return _shakespeare([genre.strip() for genre in genres.split(",")] if genres else GENRES)
    path = Path(data)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"load_documents: {str(data)!r} is neither 'shakespeare' nor an existing file or folder; check "
            "the spelling of the path"
        )
    if is_token_file(path):
        raise ValueError(f"load_documents: {path} holds tokens, not text; pass it to `gptfast train --data`")
    return [Document(path.name, path)]


def split_documents(documents: Sequence[Document], val_fraction: float = 0.1, seed: int = 0) -> Split:
    """Keep whole documents for validation, about `val_fraction` of the text.

    Which ones depends on `seed` and each document's name alone, so adding a document does not reshuffle the
    others. Where no choice of whole documents comes within a factor of two of the fraction (one document, or
    a few big ones), the end of each document is kept instead.

    Args:
        documents: at least one.
        val_fraction: in (0, 1).
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


def _folder(folder: Path) -> list[Document]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.txt") if path.is_file()}
    if not files:
        raise ValueError(f"load_documents: folder {folder} has no .txt file; put a file per document there")
    return [Document(name, files[name]) for name in sorted(files)]


def _choose(documents: Sequence[Document], target: float, seed: int) -> list[Document]:
    """Walk the documents in the order of a keyed hash; take each that brings the total nearer to target."""
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
        text = document.text
        cut = round(len(text) * (1 - val_fraction))
        cut = text.rfind("\n", cut - cut // 20, cut) + 1 or cut  # at the end of a line where one is near
        train.append(Document(document.name, text[:cut]))
        val.append(Document(document.name, text[cut:]))
    if not all(document.source for document in train + val):
        raise ValueError(
            f"split_documents: {documents[0].name} and the like are too short to keep {val_fraction:.0%} for "
            "validation; add text"
        )
    of = "the text" if len(documents) == 1 else f"each of {len(documents)} documents"
    return Split(train, val, f"validation: the last {val_fraction:.0%} of {of}")
