"""Samplers of training and validation windows. The windows of a step are a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from gptfast.data.packing import Batch, begins_in, inputs_and_targets, packed
from gptfast.data.splitmix import finalised, mixed
from gptfast.data.token_file import TokenFile

if TYPE_CHECKING:
    from torch import Tensor

Take = Callable[[np.ndarray], np.ndarray]  # positions -> tokens

_MASK = 2**64 - 1
_ROUNDS = 8


class WindowSampler:
    """Windows of block_size + 1 adjacent tokens, in a random order that visits each once per epoch.

    An epoch cuts the N tokens into n = (N - block_size) // block_size windows (at least one) that start at
    phase + i * block_size. The phase is drawn for each epoch, so the cuts move. The order of the windows is a keyed
    permutation of 0..n-1: no state is stored, and any step can be computed at any time.

    Args:
        tokens: a token file or an array (N,) of ids.
        block_size: T, tokens in one row; N must be at least T + 1.
        batch_size: B, rows of one batch, on each rank.
        seed: in [0, 2**64).
        rank, world_size: index and number of processes. Together they see the rows of one process with a batch of
            world_size * batch_size.
        pack_documents: batches have a third part that keeps attention inside documents, see `gptfast.data.packing`.
    Raises:
        ValueError: too few tokens, a size, seed or rank out of range, or pack_documents without documents.
    """

    def __init__(
        self,
        tokens: TokenFile | np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pack_documents: bool = False,
    ) -> None:
        _check_sizes("WindowSampler", tokens, block_size + 1, block_size, batch_size)
        if not 0 <= seed <= _MASK:
            raise ValueError(f"WindowSampler: seed is {seed}; expected 0 <= seed < 2**64")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"WindowSampler: rank is {rank} and world_size {world_size}; expected 0 <= rank < world_size"
            )
        self.take, self.vocab_size = _unpack(tokens)
        self._documents = documents_of(tokens) if pack_documents else None
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.windows_per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._phases = min(block_size, len(tokens) - self.windows_per_epoch * block_size)

    def batch(self, step: int) -> Batch:
        """The rows of a step, >= 0; every batch counts, also those of one accumulated update.

        Returns:
            x, y: (B, T) int64, y[b, t] being the token that follows x[b, t]; with pack_documents see `packed`.
        Raises:
            ValueError: a negative step, or an id outside the vocabulary of the token file, which is damaged.
            OSError: the token file was changed or cut short after it was opened.
        """
        return self._batch(self.starts(step))

    def batch_from(self, row: int) -> Batch:
        """The batch that begins with row number `row`, for a run whose batch size changes; batch(step) is
        batch_from(step * batch_size)."""
        return self._batch(self._starts(row))

    def _batch(self, starts: np.ndarray) -> Batch:
        rows = self.tokens_at(starts)
        if self._documents is None:
            return inputs_and_targets(rows)
        return packed(*inputs_and_targets(rows), begins_in(self._documents, starts, self.block_size))

    def starts(self, step: int) -> np.ndarray:
        """(B,) int64: the positions at which the rows of a step begin."""
        if step < 0:
            raise ValueError(f"WindowSampler.batch: step is {step}; expected step >= 0")
        return self._starts((step * self.world_size + self.rank) * self.batch_size)

    def rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows with these numbers in the endless order, (n, T + 1) int64; with pack_documents where documents begin in
        them, (n, T + 1) bool, else None.

        Raises:
            ValueError, OSError: as `batch`.
        """
        starts = np.concatenate([self._starts(number, 1) for number in numbers.tolist()])
        begins = None if self._documents is None else begins_in(self._documents, starts, self.block_size)
        return self.tokens_at(starts), begins

    def starts_from(self, row: int, count: int) -> np.ndarray:
        """(count,) int64: the positions at which the rows from number `row` on begin."""
        return self._starts(row, count)

    def tokens_at(self, starts: np.ndarray) -> np.ndarray:
        """(n, T + 1) int64: the tokens of the windows that begin at `starts`. Raises ValueError, OSError as `batch`."""
        return _taken(self.take, starts, self.block_size, self.vocab_size)

    def _starts(self, first: int, count: int | None = None) -> np.ndarray:
        parts = shuffled(first, count or self.batch_size, self.windows_per_epoch, self.seed)
        return np.concatenate([self._phase(epoch) + windows * self.block_size for epoch, windows in parts])

    def _phase(self, epoch: int) -> int:
        return _key(self.seed, epoch, 0) % self._phases


def sequential_batches(
    tokens: TokenFile | np.ndarray, block_size: int, batch_size: int, pack_documents: bool = False
) -> Iterator[Batch]:
    """All tokens in order, for an evaluation that predicts every token but the first exactly once.

    Yields:
        x, y: (B, T) int64; the last batch may have fewer rows. After the end of the text y is -100 (ignored) and x is 0. With
        pack_documents see `packed`.
    Raises:
        ValueError: fewer than two tokens, or a size out of range.
    """
    _check_sizes("sequential_batches", tokens, 2, block_size, batch_size)
    take, vocab_size = _unpack(tokens)
    starts = np.arange(0, len(tokens) - 1, block_size)
    for first in range(0, len(starts), batch_size):
        rows = starts[first : first + batch_size]
        if rows[-1] + block_size < len(tokens):
            x, y = inputs_and_targets(_taken(take, rows, block_size, vocab_size))
        else:
            x, y = _padded_rows(take, len(tokens), rows, block_size, vocab_size)
        yield packed(x, y, begins_in(documents_of(tokens), rows, block_size)) if pack_documents else (x, y)


def shuffled(first: int, count: int, n: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Part of an endless sequence that goes through 0..n-1 once per epoch, in another order each time; no state is stored.

    Args:
        first, count: where the part begins, and its length; it may cross the ends of epochs.
        n: at least 1.
        seed: of the orders.
    Yields:
        (epoch, numbers), one pair for each epoch that the part meets.
    """
    end = first + count
    while first < end:
        epoch, index = divmod(first, n)
        length = min(end - first, n - index)
        yield epoch, permute(np.arange(index, index + length), n, seed, epoch)
        first += length


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `index` (int64, in [0, n)) under the permutation of 0..n-1 of (seed, epoch).

    A Feistel network over the smallest power of two >= n, repeated until the value is below n (Black and Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002). Its halves may differ by one bit, so their widths swap every
    round. The round function is the finaliser of SplitMix64.
    """
    bits = max(2, (n - 1).bit_length())
    keys = [np.uint64(_key(seed, epoch, i)) for i in range(1, _ROUNDS + 1)]
    value = _feistel(index.astype(np.uint64), bits, keys)
    outside = value >= n
    while outside.any():
        value[outside] = _feistel(value[outside], bits, keys)
        outside = value >= n
    return value.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """A permutation of 0..2**bits-1. The number of keys is even, so the widths of the halves end as they begin."""
    left, right = bits // 2, bits - bits // 2
    for key in keys:
        high, low = value >> np.uint64(right), value & np.uint64(2**right - 1)
        value = (low << np.uint64(left)) | (high ^ (finalised(low ^ key) & np.uint64(2**left - 1)))
        left, right = right, left
    return value


def derived_seed(seed: int, purpose: int) -> int:
    """A seed in [0, 2**64) for one of several independent orders."""
    return _key(seed, 0, purpose)


def _key(seed: int, epoch: int, purpose: int) -> int:
    return mixed(mixed(mixed(seed) + epoch) + purpose)


def _taken(take: Take, starts: np.ndarray, block_size: int, vocab_size: int | None) -> np.ndarray:
    rows = take(starts[:, None] + np.arange(block_size + 1)).astype(np.int64)  # (B, T + 1)
    _check_ids(rows, vocab_size)
    return rows


def documents_of(tokens: TokenFile | np.ndarray) -> np.ndarray:
    """The positions at which documents begin. Raises ValueError for an array, which does not tell them."""
    if not isinstance(tokens, TokenFile):
        raise ValueError("WindowSampler: pack_documents needs a token file, which tells where documents begin")
    return tokens.document_starts


def _padded_rows(
    take: Take, count: int, starts: np.ndarray, block_size: int, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    import torch

    places = starts[:, None] + np.arange(block_size + 1)
    rows = take(np.minimum(places, count - 1)).astype(np.int64)
    _check_ids(rows, vocab_size)
    known = places[:, 1:] < count  # y exists
    x, y = np.where(known, rows[:, :-1], 0), np.where(known, rows[:, 1:], -100)
    return torch.from_numpy(x), torch.from_numpy(y)


def _unpack(tokens: TokenFile | np.ndarray) -> tuple[Take, int | None]:
    return (tokens.take, tokens.vocab_size) if isinstance(tokens, TokenFile) else (tokens.__getitem__, None)


def _check_ids(rows: np.ndarray, vocab_size: int | None) -> None:
    if vocab_size is not None and rows.max() >= vocab_size:
        raise ValueError(
            f"token file: id {rows.max()} lies outside its vocabulary of {vocab_size}; the file is damaged - "
            "prepare the data again"
        )


def _check_sizes(owner: str, tokens: TokenFile | np.ndarray, needed: int, block_size: int, batch_size: int) -> None:
    for name, value in (("block_size", block_size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{owner}: {name} is {value}; expected at least 1")
    if len(tokens) < needed:
        raise ValueError(
            f"{owner}: the data has {len(tokens)} tokens; expected at least {needed} for block_size "
            f"{block_size} and the token that follows - use more text, or a smaller block_size"
        )
