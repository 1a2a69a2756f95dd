"""Encoding documents on all cores, piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np

from gptfast.data.documents import Document
from gptfast.data.work import Part
from gptfast.data.workers import Workers
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.pieces import BLOCK, LINES, pieces

_SHORT = 256  # characters that take as long to encode as the call itself

Encoded = tuple[Any, np.ndarray, int]  # mark of the document, ids of a piece, its bytes of UTF-8


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int | None = None, block: int = BLOCK
) -> Generator[Encoded]:
    """The ids of every piece of every document, in order: (index of the document, ids, bytes of UTF-8).

    Pieces are read while others are encoded, a few at a time, so memory does not grow with the text. tiktoken encodes on
    all cores that the process may use.

    Args:
        workers: threads that encode; None: one a core that the process may use.
        block: characters of a piece, about.
    Raises:
        OSError: a file cannot be read.
        ValueError: text that cannot be read or encoded; the message names the document.
    """
    tokenizer = getattr(tokenizer, "inner", tokenizer)  # a lenient one decodes differently, and encodes alike
    with Workers(workers, processes=False) as threads:
        threads.use(tokenizer)
        with closing(encode_batches(enumerate(documents), tokenizer, threads, block=block)) as batches:
            for batch in batches:
                yield from batch


def encode_batches(
    documents: Iterable[tuple[Any, Document]], tokenizer: Tokenizer, workers: Workers, skip: int = 0, block: int = BLOCK
) -> Generator[list[Encoded]]:
    """The ids of every piece of every document, in order and in batches, which depend on the documents alone.

    Args:
        documents: each after a mark, which its pieces get.
        workers: to which `tokenizer` was given.
        skip: batches at the beginning that are read, but not encoded.
        block: characters of a piece, about.
    Raises:
        OSError, ValueError: as `encode_documents`.
    """
    whole, cuts = getattr(tokenizer, "whole_texts", False), getattr(tokenizer, "cuts", LINES)

    def parts() -> Iterator[Part]:
        for mark, document in documents:
            start = 0
            for piece in [document.text] if whole else pieces(document.blocks(block), cuts):
                yield mark, document.name, start, piece
                start += len(piece)

    return workers.map("encode", islice(batches_of(parts(), lambda part: len(part[-1]), block), skip, None))


def batches_of(parts: Iterable[Any], size_of: Any, most: int = BLOCK) -> Iterator[list[Any]]:
    """Batches of short texts, because passing one to a worker takes longer than encoding it."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += size_of(part) + _SHORT
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
