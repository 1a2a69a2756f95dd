"""Token plus position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.ops import reference
from gptfast.ops._common import check_float, check_same_device


def embedding(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """wte[ids] + wpe[positions].

    Args:
        ids: (..., T) int64 or int32, token ids in [0, V).
        wte: (V, C) token embeddings.
        wpe: (block_size, C) position embeddings, or None.
        positions: broadcastable to ids, int64; None: 0 .. T - 1.
    Returns:
        (..., T, C) in wte's dtype.
    Raises:
        TypeError: ids are not integers.  ValueError: more positions than wpe has rows.
        IndexError: an id or a position outside its table (raised by PyTorch).
    """
    check_float("embedding", wte=wte, wpe=wpe)
    check_same_device("embedding", ids=ids, wte=wte, wpe=wpe, positions=positions)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"embedding: ids has dtype {ids.dtype}; expected int64 or int32 token ids")
    if wpe is not None and positions is None and ids.shape[-1] > wpe.shape[0]:
        raise ValueError(
            f"embedding: ids has {ids.shape[-1]} positions but wpe has {wpe.shape[0]} rows; shorten the input"
        )
    return reference.embedding(ids, wte, wpe, positions)
