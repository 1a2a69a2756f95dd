"""Running token sequences of a model: all that a generation loop knows of it.  V vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gptfast.config import GPTConfig


class Sampling(NamedTuple):
    """How the tokens of one row are drawn; see `gptfast.ops.sample`. vocab: among so many first ids; 0: all."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    stream: int
    vocab: int = 0


class Sequences(Protocol):
    """Token sequences of one model, each a row with its keys and values."""

    @property
    def lengths(self) -> list[int]:
        """Positions that each row holds; 0 for a row that is free."""
        ...

    @property
    def own_threads(self) -> bool:
        """Whether `extend` computes on threads of its own, and not on torch's."""
        ...

    def extend(self, rows: Seq[int], tokens: Seq[Seq[int]], last_only: bool = True) -> Tensor | list[Tensor]:
        """Append tokens[i] (any number, at least one) to row rows[i]; rows are distinct.

        Returns:
            fp32 logits: (len(rows), V) of the last token of each row, or, with last_only=False, a list of
            (len(tokens[i]), V).
        """
        ...

    def draw(self, logits: Tensor, samplings: Seq[Sampling], positions: Seq[int]) -> list[int] | None:
        """The tokens that `ops.sample` draws from logits, (B, V) fp32, on threads of the model's own.

        Args:
            samplings: of each row, how.
            positions: of the tokens in their sequences.
        Returns:
            The tokens; -1 where a row holds nan, -2 where nothing but -inf. None: the model has no threads of its own.
        """
        ...

    def decode(
        self,
        rows: Seq[int],
        logits: Tensor,
        *,
        steps: int,
        more: bool,
        samplings: Seq[Sampling],
        ends: Seq[int],
    ) -> list[list[int]] | None:
        """Draw `steps` tokens for each of the rows, fewer behind one of `ends` or an `interrupt`, and append all but the
        last (`more`: the last too).

        Args:
            logits: as `extend` returned them for these rows; they are written over.
            samplings: of each row, how.
        Returns:
            As `draw`, of each row; a draw that fails is the last for all.
        """
        ...

    def interrupt(self) -> None:
        """From any thread: a `decode` that runs now, or the next one, ends behind its next token."""
        ...

    def add(self, count: int = 1, like: int | None = None) -> list[int]:
        """Make rows: empty ones, or copies of row `like`. Returns their numbers.

        Raises:
            RuntimeError: there is no room.
        """
        ...

    def reorder(self, rows: Seq[int], sources: Seq[int]) -> None:
        """Row rows[i] becomes a copy of what row sources[i] was before the call."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget what lies behind the first `length` positions of a row."""
        ...

    def release(self, row: int) -> None:
        """Free a row; its number may be given out again."""
        ...


class LanguageModel(Protocol):
    """What can generate: `GPT`, or a compiled engine."""

    @property
    def config(self) -> GPTConfig:
        """Of which generation reads vocab_size and block_size."""
        ...

    def sequences(self, capacity_rows: int, max_len: int) -> Sequences:
        """Room for `capacity_rows` rows of at most `max_len` positions each."""
        ...


@contextmanager
def beside(sequences: Sequences) -> Iterator[None]:
    """For torch's work on logits between two steps: on one thread where the model has threads of its own.

    After an op that torch shares out among its OpenMP threads, these spin for up to hundreds of milliseconds on cores
    that the model's threads need. (A thread that first uses torch meanwhile takes over that it has one thread; see
    `usual_threads`.)
    """
    global _before
    threads = torch.get_num_threads()
    if threads == 1 or not sequences.own_threads:
        yield
        return
    _before = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_before = 0  # how many threads torch had when `beside` last took them away; 0: it never did


def usual_threads() -> int:
    """How many threads torch has when no `beside` is running: what a thread was told inside one is not believed."""
    if _before and threading.current_thread() is not threading.main_thread():
        return _before
    return torch.get_num_threads()
