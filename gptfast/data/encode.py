"""Encoding documents on all cores, piece by piece, and writing their token files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from gptfast._busy import usable_cores
from gptfast.data.documents import Document
from gptfast.data.token_file import TokenWriter
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.pieces import BLOCK, LINES, pieces

T = TypeVar("T")
R = TypeVar("R")
_LONG = 8_000_000  # bytes; shorter texts have no progress bar
_SHORT = 256  # characters that take as long to encode as the call itself


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int | None = None
) -> Generator[tuple[int, np.ndarray, int]]:
    """The ids of every piece of every document, in order: (index of the document, ids, bytes of UTF-8).

    Pieces are read while others are encoded, a few at a time, so memory does not grow with the text. tiktoken encodes on
    all cores that the process may use.

    Args:
        workers: threads that encode; None: one a core that the process may use.
    Raises:
        OSError: a file cannot be read.
        ValueError: text that cannot be read or encoded; the message names the document.
    """
    encode = getattr(tokenizer, "encode_array", None) or (lambda text: np.array(tokenizer.encode(text), np.uint32))
    whole, cuts = getattr(tokenizer, "whole_texts", False), getattr(tokenizer, "cuts", LINES)

    def parts() -> Iterator[tuple[int, str, int, str]]:
        for n, document in enumerate(documents):
            start = 0
            for piece in [document.text] if whole else pieces(document.blocks(), cuts):
                yield n, document.name, start, piece
                start += len(piece)

    def encoded(batch: list[tuple[int, str, int, str]]) -> list[tuple[int, np.ndarray, int]]:
        return [one(*part) for part in batch]

    def one(n: int, name: str, start: int, piece: str) -> tuple[int, np.ndarray, int]:
        try:
            ids = encode(piece)
        except ValueError as error:
            raise ValueError(f"{name}, counted from character {start}: {error}") from error
        return n, ids, len(piece) if piece.isascii() else len(piece.encode())

    with closing(_map(encoded, _batches(parts()), workers or usable_cores())) as batches:
        for batch in batches:
            yield from batch


def _batches(parts: Iterable[tuple[int, str, int, str]]) -> Iterator[list[tuple[int, str, int, str]]]:
    """Batches of short documents, because passing one to a thread takes longer than encoding it."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[-1]) + _SHORT
        if size >= BLOCK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map(function: Callable[[T], R], items: Iterator[T], threads: int) -> Generator[R]:
    """The results of a function on several threads, in the order of the items; a few items are read ahead."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def write_part(
    path: Path,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
    workers: int | None = None,
) -> dict[str, int]:
    """Write the token file of documents; returns its entry in data.json. `advance` receives the bytes of each piece."""
    size = 0

    def counted(encoded: Iterable[tuple[int, np.ndarray, int]]) -> Iterator[np.ndarray]:
        nonlocal size
        for _, ids, n_bytes in encoded:
            size += n_bytes
            advance(n_bytes)
            yield ids

    with path.open("wb") as file, closing(encode_documents(documents, tokenizer, workers)) as encoded:
        writer = TokenWriter(file, tokenizer.vocab_size, tokenizer.eos_id)
        writer.write(counted(group) for _, group in groupby(encoded, key=itemgetter(0)))
    return {"documents": len(writer.starts), "tokens": writer.count, "bytes": size}


@contextmanager
def progress_bar(documents: Iterable[Document], wanted: bool) -> Iterator[Callable[[int], None]]:
    total = sum(document.size for document in documents)
    console = Console(stderr=True)
    hidden = not wanted or total < _LONG or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("tokenising", total=total)
        yield lambda n_bytes: bar.advance(task, n_bytes)
