"""Batches whose rows hold several documents, each of which is learnt as if it stood alone.

A batch is x, y, (B, T) each. A packed one has a third part, the ends of its texts as `GPT.forward` takes them: offsets into its rows
one after another, at every document that begins in a row and at every row. So attention stays inside a document, positions
begin at 0 in each, and nothing is predicted across an end: y is -100 at the last token of a document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Batch = tuple["Tensor", ...]


def inputs_and_targets(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """x, y: (B, T) int64 of rows (B, T + 1): the tokens, and those that follow."""
    import torch  # not needed to prepare data

    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def begins_in(documents: np.ndarray, starts: np.ndarray, block_size: int) -> np.ndarray:
    """(n, T + 1) bool: whether a document begins at each position of the rows that begin at `starts`.

    Args:
        documents: the positions at which documents begin, rising.
        starts: (n,) int64.
        block_size: T.
    """
    begins = np.zeros((len(starts), block_size + 1), bool)
    low, high = (np.searchsorted(documents, starts + more).tolist() for more in (0, block_size + 1))
    for n, start in enumerate(starts.tolist()):
        begins[n, documents[low[n] : high[n]] - start] = True
    return begins


def packed(x: Tensor, y: Tensor, begins: np.ndarray) -> Batch:
    """x; y with -100 where the next token begins another document; ends (n + 1,) int32, from 0 to B * T.

    Args:
        x, y: (B, T) int64.
        begins: (B, T + 1) bool, whether a document begins there.
    """
    import torch

    first = begins[:, :-1].copy()
    first[:, 0] = True
    ends = np.append(np.flatnonzero(first), first.size).astype(np.int32)
    return x, y.masked_fill(torch.from_numpy(begins[:, 1:].copy()), -100), torch.from_numpy(ends)


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    """The rows start to stop of a batch."""
    x, y, *packed_ends = batch
    if not packed_ends:
        return x[start:stop], y[start:stop]
    (ends,), T = packed_ends, x.shape[1]
    inside = ends[(ends >= start * T) & (ends <= stop * T)]
    return x[start:stop], y[start:stop], inside - start * T
