"""The split of documents into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptfast._files import open_read
from gptfast.data.documents import Document
from gptfast.data.spool import Slice

_LISTED = 6  # documents that a note names


@dataclass(frozen=True)
class Split:
    """Documents, divided into those to train on and those to validate on.

    train, val: the documents of each part.
    note: a sentence for the user that describes the split.
    """

    train: list[Document]
    val: list[Document]
    note: str


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
    check_fraction(val_fraction)
    if not documents:
        raise ValueError("split_documents: documents is empty; expected at least one document")
    keys = np.array([split_key(seed, document.name) for document in documents], np.uint64)
    chosen = choose(keys, np.array([document.size for document in documents], np.int64), val_fraction)
    if chosen is None:
        parts = [divide(document, val_fraction) for document in documents]
        return Split([a for a, _ in parts], [b for _, b in parts], ends_note(len(documents), val_fraction))
    for_val = set(chosen.tolist())
    train = [document for n, document in enumerate(documents) if n not in for_val]
    val = [documents[n] for n in chosen.tolist()]
    total = sum(document.size for document in documents)
    share = sum(document.size for document in val) / total
    return Split(train, val, choice_note(len(val), len(documents), share, [d.name for d in val[: _LISTED + 1]]))


def check_fraction(val_fraction: float) -> None:
    """Raise ValueError unless it is in (0, 1)."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"split_documents: val_fraction is {val_fraction}; expected 0 < val_fraction < 1")


def split_key(seed: int, name: str) -> int:
    """The place of a document in the order in which documents are chosen for validation, in [0, 2**64)."""
    text = f"{seed}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def choose(keys: np.ndarray, sizes: np.ndarray, val_fraction: float) -> np.ndarray | None:
    """The numbers of the documents for validation, in the order of their keys; None where the ends of all serve better.

    In that order each document is chosen that brings the total nearer to `val_fraction` of the bytes, but never all.

    Args:
        keys, sizes: (n,) uint64 and int64, of each document.
    """
    order = np.argsort(keys, kind="stable")
    sizes = sizes[order]
    target = val_fraction * float(sizes.sum())
    taken = np.zeros(len(sizes), bool)
    size, at = 0, 0
    while at < len(sizes) and size < target:
        before = size + np.concatenate([[0], np.cumsum(sizes[at:])[:-1]])  # what is chosen before each, if all are
        fits = np.abs(before + sizes[at:] - target) < np.abs(before - target)
        run = len(fits) if fits.all() else int(fits.argmin())
        taken[at : at + run] = True
        size += int(sizes[at : at + run].sum())
        at += run
        smaller = np.flatnonzero(np.abs(size + sizes[at:] - target) < abs(size - target))
        if not len(smaller):
            break
        at += int(smaller[0])
    if taken.all():
        taken[-1] = False
        size -= int(sizes[-1])
    if size == 0 or not target / 2 <= size <= target * 2:
        return None
    return order[taken]


def choice_note(chosen: int, documents: int, share: float, names: Sequence[str]) -> str:
    """names: of the first that are chosen, or none."""
    listed = ", ".join(names[:_LISTED]) + (", …" if chosen > _LISTED else "")
    return f"validation: {chosen} of {documents} documents, {share:.1%} of the text" + (f" ({listed})" if names else "")


def ends_note(documents: int, val_fraction: float) -> str:
    of = "the text" if documents == 1 else f"each of {documents} documents"
    return f"validation: the last {val_fraction:.0%} of {of}"


def divide(document: Document, val_fraction: float) -> tuple[Document, Document]:
    """The two parts of a document, cut at the end of a line if one is near.

    Raises:
        OSError, ValueError: the document cannot be read, or is too short.
    """
    parts = (_divide_text if isinstance(document.source, str) else _divide_file)(document, val_fraction)
    if not all(part.size for part in parts):
        if document.size < 100:
            "".join(document.blocks())  # raises where it is not text
        raise ValueError(
            f"split_documents: {document.name} and the like are too short for a validation part of {val_fraction:.0%}; "
            "add text"
        )
    return parts


def _divide_text(document: Document, val_fraction: float) -> tuple[Document, Document]:
    text = str(document.source)
    cut = round(len(text) * (1 - val_fraction))
    cut = text.rfind("\n", cut - cut // 20, cut) + 1 or cut
    return Document(document.name, text[:cut]), Document(document.name, text[cut:])


def _divide_file(document: Document, val_fraction: float) -> tuple[Document, Document]:
    """Of a file or slice, counted in bytes, without reading all of it."""
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
