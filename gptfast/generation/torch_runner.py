"""Running token sequences of a `GPT` in PyTorch, over a `KVCache`.  V vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.generation.runner import Sampling
from gptfast.nn.difference import check_values
from gptfast.nn.kv_cache import KVCache

if TYPE_CHECKING:
    from gptfast.nn.transformer import Transformer


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

    def __init__(self, model: Transformer, capacity_rows: int, max_len: int) -> None:
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
def for_generation(model: Transformer) -> Iterator[None]:
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
