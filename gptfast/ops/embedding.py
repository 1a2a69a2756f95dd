"""Token plus position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES, resolve, transformed
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_same_device
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import rows_of


def embedding(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """wte[ids] + wpe[positions] in one pass.

    The gradients of the tables are summed in fp32 in the order of the rows: deterministic, without atomics.

    Args:
        ids: (..., T) int64 or int32, token ids in [0, V).
        wte: (V, C) token embeddings.
        wpe: (block_size, C) position embeddings, or None.
        positions: broadcastable to ids, int64; None: 0 .. T - 1.
    Returns:
        (..., T, C) in wte's dtype.
    Raises:
        TypeError: ids are not integers.  ValueError: more positions than wpe has rows.
        IndexError: an id or a position outside its table. On a GPU, which cannot look without waiting, such a row is
            nan instead.
    """
    check_float("embedding", wte=wte, wpe=wpe)
    check_same_device("embedding", ids=ids, wte=wte, wpe=wpe, positions=positions)
    for name, indices in (("ids", ids), ("positions", positions)):
        if indices is None and name == "positions":
            continue
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"embedding: {name} has dtype {got}; expected a tensor of int64 or int32")
    if ids.dim() == 0:
        raise ValueError("embedding: ids has shape (); expected (..., T) token ids: one id as ids[None]")
    if wpe is not None and positions is None and ids.shape[-1] > wpe.shape[0]:
        raise ValueError(
            f"embedding: ids has {ids.shape[-1]} positions but wpe has {wpe.shape[0]} rows; shorten the input"
        )
    tables = [table for table in (wte, wpe) if table is not None]
    supported = all(table.dtype in KERNEL_DTYPES for table in tables)
    runs_on = resolve("embedding", None, wte) if supported else "eager"
    if runs_on in ("cpu", "eager"):
        _check_range("ids", ids, wte)
        if wpe is not None and positions is not None:
            _check_range("positions", positions, wpe)
    if runs_on == "eager":
        return reference.embedding(ids, wte, wpe, positions)
    positions = None if positions is None else positions.expand(ids.shape).long()
    return _fused(runs_on, ids.long(), wte, wpe, positions)


def _check_range(name: str, indices: Tensor, table: Tensor) -> None:
    if torch.compiler.is_compiling() or indices.device.type != "cpu" or transformed() or not indices.numel():
        return
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or high >= table.shape[0]:
        raise IndexError(
            f"embedding: {name} holds {high if low >= 0 else low}; expected 0 to {table.shape[0] - 1}, the rows of the "
            "table - was the text encoded with another tokenizer?"
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, call: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    ids, wte, wpe, positions = ctx.saved_tensors
    rows = rows_of(dout)
    dwte = _table_gradient(call, rows, ids, wte) if ctx.needs_input_grad[1] else None
    if wpe is None or not ctx.needs_input_grad[2]:
        return None, dwte, None, None
    if positions is None:
        positions = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    return None, dwte, _table_gradient(call, rows, positions, wpe), None


def _table_gradient(call: Any, dout: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    keys, order = ids.reshape(-1).sort(stable=True)
    return call("embedding_bwd", dout, keys, order, table)


@register_fake("embedding_fwd")
def _(ids: Tensor, wte: Tensor, wpe: Tensor | None, positions: Tensor | None) -> Tensor:
    return wte.new_empty(*ids.shape, wte.shape[1])


@register_fake("embedding_bwd")
def _(dout: Tensor, keys: Tensor, order: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(table.shape)


_fused = differentiable("embedding_fwd", _save, _backward)
forbid_double_backward("embedding", "embedding_bwd")
