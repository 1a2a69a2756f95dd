"""Running token sequences of a model: all that a generation loop knows of it.  V vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gptfast.models.difference import check_values
from gptfast.models.kv_cache import KVCache

if TYPE_CHECKING:
    from gptfast.models import GPT, GPTConfig


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


class CachedSequences:
    """`Sequences` of a `GPT` over one `KVCache`.

    Rows that are in use lie side by side in the cache, in slots 0 to n - 1, so that a step of all of them is one
    forward over a slice; a row that is freed leaves its slot to the last one.

    Prompts run one by one, without padding, and single tokens of several rows together. A row's logits are those of its
    run alone, up to the rounding of matrix products, which libraries do differently for different numbers of rows;
    GPTFAST_GEMM=own multiplies in a way that does not, and makes them equal bit for bit.

    Args:
        model: a GPT; it runs in evaluation mode, and its training flags are the same afterwards.
        capacity_rows: the most rows at a time.
        max_len: the most positions of a row, at most block_size.
    """

    own_threads = False

    def __init__(self, model: GPT, capacity_rows: int, max_len: int) -> None:
        weight = model.wte.weight
        if weight.is_meta:
            check_values("generate", model)
        self._model = model
        config = model.config.replace(n_layer=len(model.h)) if len(model.h) != model.config.n_layer else model.config
        self._cache = KVCache(config, capacity_rows, max_len, weight.dtype, weight.device)
        self.lengths = [0] * capacity_rows
        self._row_in: list[int] = []  # of each slot in use
        self._slot_of: dict[int, int] = {}
        self._free = list(range(capacity_rows))[::-1]
        self._lock = threading.RLock()  # threads take turns; rows are checked where they are used

    def _check(self, what: str, rows: Seq[int]) -> None:
        """The rows of a call must be in use, and different."""
        for row in rows:
            if row not in self._slot_of:
                raise ValueError(f"{what}: row {row} is not in use; rows come from add() and end with release()")
        if len(set(rows)) != len(rows):
            raise ValueError(f"{what}: rows {list(rows)}; expected different rows")

    def extend(self, rows: Seq[int], tokens: Seq[Seq[int]], last_only: bool = True) -> Tensor | list[Tensor]:
        logits: dict[int, Tensor] = {}
        with self._lock, for_generation(self._model):
            self._check("extend", rows)
            single = [row for row, new in zip(rows, tokens, strict=True) if len(new) == 1]
            new_of = dict(zip(rows, tokens, strict=True))
            for run in self._neighbours(single):
                step = self._forward(run, [new_of[row] for row in run])  # (len(run), 1, V)
                logits.update(zip(run, step, strict=True))
            for row, new in new_of.items():
                if len(new) != 1:
                    logits[row] = self._forward([row], [new], last_only)[0]
            ordered = [logits[row].float() for row in rows]
            return torch.cat([part[-1:] for part in ordered]) if last_only else ordered

    def draw(self, logits: Tensor, samplings: Seq[Sampling], positions: Seq[int]) -> None:
        return None

    def decode(self, rows: Seq[int], logits: Tensor, **_: Any) -> None:
        return None

    def interrupt(self) -> None:
        pass

    def _neighbours(self, rows: list[int]) -> Iterator[list[int]]:
        """The rows in the order of their slots, cut where slots are missing between them."""
        run: list[int] = []
        for row in sorted(rows, key=self._slot_of.__getitem__):
            if run and self._slot_of[row] != self._slot_of[run[-1]] + 1:
                yield run
                run = []
            run.append(row)
        if run:
            yield run

    def _forward(self, rows: list[int], tokens: list[Seq[int]], last_only: bool = False) -> Tensor:
        """Append equally many tokens, (B, T), to rows in neighbouring slots; logits (B, T, V), (B, 1, V) if last_only."""
        first = self._slot_of[rows[0]]
        cache = self._cache.rows(first, first + len(rows), [self.lengths[row] for row in rows])
        ids, before = torch.tensor(tokens, dtype=torch.int64, device=self._cache.k.device), cache.lengths
        logits = self._model(ids, cache=cache, last_only=last_only)
        if cache.lengths is before:
            raise RuntimeError(
                f"generate: a forward of this {type(self._model).__name__} leaves its cache= unused; hand it on to GPT's "
                "forward, or generate without a cache: call the model on the whole text for every token"
            )
        for row in rows:
            self.lengths[row] += ids.shape[1]
        return logits[:, None] if last_only else logits

    def add(self, count: int = 1, like: int | None = None) -> list[int]:
        with self._lock:
            if like is not None:
                self._check("add", [like])
            if count > len(self._free):
                raise RuntimeError(
                    f"sequences: {count} more rows, but {len(self._free)} of {len(self.lengths)} are free; release some, or "
                    "make room for more"
                )
            rows = [self._free.pop() for _ in range(count)]
            for row in rows:
                self._slot_of[row] = len(self._row_in)
                self._row_in.append(row)
            if like is not None:
                self.reorder(rows, [like] * count)
            return rows

    def reorder(self, rows: Seq[int], sources: Seq[int]) -> None:
        with self._lock:
            self._check("reorder", rows)
            self._check("reorder", sorted(set(sources)))
            moves = [(row, source) for row, source in zip(rows, sources, strict=True) if row != source]
            if not moves:
                return
            lengths = [self.lengths[source] for _, source in moves]
            to, of = ([self._slot_of[row] for row in part] for part in zip(*moves, strict=True))
            self._cache.copy_rows(to, of, max(lengths))
            for (row, _), length in zip(moves, lengths, strict=True):
                self.lengths[row] = length

    def truncate(self, row: int, length: int) -> None:
        with self._lock:
            self._check("truncate", [row])
            if not 0 <= length <= self.lengths[row]:
                raise ValueError(f"truncate: length is {length}; row {row} holds {self.lengths[row]} positions")
            self.lengths[row] = length

    def release(self, row: int) -> None:
        with self._lock:
            self._check("release", [row])
            slot, last = self._slot_of.pop(row), self._row_in.pop()
            if last != row:
                self._cache.copy_rows([slot], [len(self._row_in)], self.lengths[last])
                self._slot_of[last] = slot
                self._row_in[slot] = last
            self.lengths[row] = 0
            self._free.append(row)


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


@contextmanager
def for_generation(model: GPT) -> Iterator[None]:
    """Evaluation mode without autograd; the training flag of every module comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
