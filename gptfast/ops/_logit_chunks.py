"""Losses and gradients of a head, from the logits of a chunk of rows at a time.  N rows, C channels, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptfast.backend import kernels
from gptfast.ops.gemm import gemm

CHUNK_BYTES = 74 << 20  # of logits in memory; with 16 MB of packed weight less than 100 MB in all
GPU_CHUNK_BYTES = 512 << 20  # every chunk reads and writes the gradient of weight once: large chunks make that cheap
GPU_ROW = 64  # values
TILE_ROWS = 96


def _chunks(rows: int, bytes_per_row: int, most_bytes: int) -> Iterator[slice]:
    """Slices of equal size, of whole tiles, each at most `most_bytes` but at least one tile."""
    most = max(TILE_ROWS, most_bytes // bytes_per_row // TILE_ROWS * TILE_ROWS)
    parts = max(1, -(-rows // most))
    size = max(1, min(most, -(-rows // (parts * TILE_ROWS)) * TILE_ROWS))
    return (slice(n, min(n + size, rows)) for n in range(0, rows, size))


def _logits_by_chunk(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of rows, their logits in hidden's dtype); all chunks share one buffer."""
    N, V, buffer = hidden.shape[0], weight.shape[0], None
    on_cpu = hidden.device.type == "cpu"
    # a GPU's products are fast where rows start at multiples of 16 bytes, as those of 50,257 values do not
    width = V if on_cpu else -(-V // GPU_ROW) * GPU_ROW
    for part in _chunks(N, V * hidden.element_size(), CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES):
        rows = part.stop - part.start
        buffer = hidden.new_empty(rows, width) if buffer is None else buffer
        logits = buffer[:rows, :V]
        gemm(hidden[part], weight.t(), logits, dtype=hidden.dtype)
        yield part, logits


def losses_of(
    backend: str, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    """(N,) losses, without gradients."""
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for part, logits in _logits_by_chunk(hidden, weight):
        loss[part] = kernels(backend).cross_entropy_fwd(logits, targets[part], ignore_index, label_smoothing)[0]
    return loss


def losses_and_gradients(
    backend: str,
    dloss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) losses and the gradients of sum(dloss * loss): dhidden in hidden's dtype, dweight in fp32; dloss None: ones."""
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    dhidden, dweight = room_for(hidden, weight, want_hidden, want_weight)
    if not hidden.shape[0]:
        dweight.zero_()
    for part, logits in _logits_by_chunk(hidden, weight):
        upstream = None if dloss is None else dloss[part]
        loss[part] = kernels(backend).cross_entropy_in_place(
            logits, targets[part], upstream, ignore_index, label_smoothing
        )
        if want_hidden:
            gemm(logits, weight, dhidden[part], dtype=hidden.dtype)
        if want_weight:
            gemm(logits.t(), hidden[part], dweight, dtype=hidden.dtype, accumulate=part.start > 0)
    return loss, dhidden, dweight


def room_for(hidden: Tensor, weight: Tensor, want_hidden: bool, want_weight: bool) -> tuple[Tensor, Tensor]:
    """Memory for dhidden and dweight; of no element where one is not wanted."""
    dweight = weight.new_empty(weight.shape if want_weight else (0,), dtype=torch.float32)
    return hidden.new_empty(hidden.shape if want_hidden else (0,)), dweight
