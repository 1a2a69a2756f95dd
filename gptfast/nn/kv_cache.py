"""Keys and values of the positions a GPT has seen.  B rows, T new positions, S keys, H heads of keys, D head_dim."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.ops._attention_checks import trusted


class KVCache:
    """Per-layer keys and values with room for max_len positions a row, for `GPT.forward(ids, cache=...)`.

    `lengths`, (B,) int64, says how many positions of each row are filled. It may be set: shorten a row and
    the next call overwrites what lay behind (that is how right-padded prompts of different lengths are
    started). The virtual tokens of a soft prompt lie before the positions of their row and are not counted: a row without
    positions gets them with its first, under every call it must have the same adapter.

    Args:
        config: of the model.
        batch_size: B.
        max_len: positions per row with virtual tokens, at most block_size; None: block_size.
        dtype, device: of the stored keys and values. Attention runs in this dtype.
    Raises:
        ValueError: batch_size or max_len out of range.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        max_len = config.block_size if max_len is None else max_len
        if not 1 <= max_len <= config.block_size:
            raise ValueError(f"KVCache: max_len is {max_len}; expected 1 to block_size = {config.block_size}")
        if batch_size < 1:
            raise ValueError(f"KVCache: batch_size is {batch_size}; expected at least 1")
        shape = (config.n_layer, batch_size, config.kv_heads, max_len, config.head_dim)  # L B H S_max D
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._starts: list[int] = []  # positions of the rows before the running call, on the host
        self._ends = self.lengths  # the same with one more, on the device
        self._layer = 0  # which attends next

    @property
    def batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_len(self) -> int:
        return self.k.shape[3]

    def start(self, T: int, virtual: list[int] | None = None) -> Tensor:
        """Make ready for T new positions in every row; return their numbers, (T,) or (B, T) int64.

        Args:
            virtual: number of virtual tokens before the positions of each row; None: 0.
        Raises:
            ValueError: no room.
        """
        before = self.lengths if virtual is None else self.lengths + torch.tensor(virtual, device=self.lengths.device)
        self._starts, self._ends, self._layer = before.tolist(), before + 1, 0
        if max(self._starts) + T > self.max_len:
            raise ValueError(
                f"KVCache: {max(self._starts)} positions are filled and {T} more do not fit into max_len = "
                f"{self.max_len}; make the cache longer (up to block_size) or shorten its `lengths`"
            )
        new = torch.arange(T, device=self.lengths.device)
        return new + self._starts[0] if self._uniform() else new + before[:, None]

    def finish(self, T: int) -> None:
        """Count the T positions that every layer has stored since `start`."""
        self.lengths = self.lengths + T

    def take_layer(self, k: Tensor) -> int:
        """The layer that stores k, (B, H, T, D): layers come in the order in which they run, whatever they are called.

        Raises:
            ValueError: it has no place here.
        """
        layer, (layers, _, H, _, D) = self._layer, self.k.shape
        if layer == layers or (k.shape[1], k.shape[3]) != (H, D):
            raise ValueError(
                f"KVCache: layer {layer} has {k.shape[1]} heads of {k.shape[3]} channels, and the config says {layers} layers "
                f"with {H} heads of {D}; make the config say what the modules are"
            )
        self._layer = layer + 1
        return layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        """Store k and v, (B, H, T, D), behind what is cached and attend from q to all of it, in q's shape. options: of
        `gptfast.ops.causal_attention`."""
        T, layer = q.shape[2], self.take_layer(k)
        self._store(layer, k, v)
        keys, values, query = self.k[layer], self.v[layer], q.to(self.k.dtype)
        S = max(self._starts) + T
        if self._uniform():
            out = ops.causal_attention(query, keys[:, :, :S], values[:, :, :S], window=window, **options)
        elif T == 1 and window is None:
            out = ops.causal_attention(query, keys[:, :, :S], values[:, :, :S], seq_lens=trusted(self._ends), **options)
        else:  # the last T of each row's own keys: row by row
            ends = [start + T for start in self._starts]
            rows = [slice(b, b + 1) for b in range(len(ends))]
            parts = [
                ops.causal_attention(query[b], keys[b, :, :end], values[b, :, :end], window=window, **options)
                for b, end in zip(rows, ends, strict=True)
            ]
            out = torch.cat(parts)
        return out.to(q.dtype)

    def _uniform(self) -> bool:
        return min(self._starts) == max(self._starts)

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        T, first = k.shape[2], self._starts[0]
        for cached, new in ((self.k[layer], k), (self.v[layer], v)):
            if self._uniform():
                cached[:, :, first : first + T] = new
                continue
            for b, start in enumerate(self._starts):
                cached[b, :, start : start + T] = new[b]

    def rows(self, first: int, last: int, lengths: list[int]) -> KVCache:
        """Rows first to last - 1 as a cache of their own on the same memory, filled as `lengths` says."""
        view = copy(self)
        view.k, view.v = self.k[:, first:last], self.v[:, first:last]
        view.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        return view

    def copy_rows(self, to: list[int], of: list[int], length: int) -> None:
        """Row to[i] gets the first `length` positions that row of[i] had before the call; `lengths` stays."""
        for stored in (self.k, self.v):
            stored[:, to, :, :length] = stored[:, of, :, :length]  # the right side is gathered first
