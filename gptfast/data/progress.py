"""The progress of `prepare`: bytes, tokens, documents, speed and the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LONG = 8_000_000  # bytes; shorter texts have no progress bar


class PrepareProgress:
    """A line for each of the two readings of a text.

    Args:
        bar: where they are shown.
        total: bytes to read at first, about; None: not known.
    """

    def __init__(self, bar: Progress, total: int | None) -> None:
        self._bar = bar
        self._reading = bar.add_task("reading", total=total, counts="")
        self._tokens, self._documents = 0, 0

    def read(self, size: int) -> None:
        """Bytes that were read for the first time."""
        self._bar.advance(self._reading, size)

    def begin(self, total: int, workers: str) -> None:
        """All is read; `total` bytes are to be encoded by `workers`, such as "2 processes"."""
        self._bar.remove_task(self._reading)
        self._workers = workers
        self._encoding = self._bar.add_task("tokenising", total=total, counts="")

    def encoded(self, size: int, tokens: int, documents: int) -> None:
        """Bytes that were encoded, their tokens, and documents that began in them."""
        self._tokens, self._documents = self._tokens + tokens, self._documents + documents
        counts = f"{self._tokens:,} tokens, {self._documents:,} documents, {self._workers}"
        self._bar.update(self._encoding, advance=size, counts=counts)


@contextmanager
def progress_bar(total: int, only_text: bool, wanted: bool) -> Iterator[PrepareProgress]:
    """Shows progress on standard error, if that is a terminal and there is much to do.

    Args:
        total: bytes of the files.
        only_text: and of the text in them.
        wanted: False: never.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    hidden = not wanted or total < _LONG or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield PrepareProgress(bar, total if only_text else None)
