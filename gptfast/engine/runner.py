"""Running sequences of a compiled model.  V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.generation.runner import Sampling

PANEL = 32  # logits are written in whole panels of so many


class EngineSequences:
    """Token sequences of one `CompiledGPT`, each with its keys and values: what a generation loop knows of a model.

    Several threads may call it; each call sees the rows as the one before left them.

    A row's logits depend on its own tokens alone, to the bit: not on the other rows of a call, nor on how its tokens were
    cut into calls.

    Args:
        core: the `gptfast._C.Engine`.
        config: of the model.
        capacity: the most rows.
        max_len: positions per row, at most block_size.
        check: called before and after the weights are read; raises where they are not what they were.
    Raises:
        ValueError: capacity or max_len out of range.
    """

    own_threads = True

    def __init__(
        self, core: Any, config: GPTConfig, capacity: int, max_len: int | None, check: Callable[[], None]
    ) -> None:
        from gptfast import _C

        self.config, self.capacity, self._check_weights = config, capacity, check
        self.max_len = config.block_size if max_len is None else max_len
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"sequences: capacity_rows is {capacity!r}; expected an int of at least 1")
        if not isinstance(self.max_len, int) or not 1 <= self.max_len <= config.block_size:
            raise ValueError(f"sequences: max_len is {max_len}; expected 1 to block_size = {config.block_size}")
        try:
            self._core, self._cache = core, _C.Cache(core, capacity, self.max_len)
        except (MemoryError, TypeError):  # TypeError: beyond 64 bits
            raise MemoryError(f"sequences: no memory for capacity_rows = {capacity}; run fewer at a time") from None

    @property
    def lengths(self) -> list[int]:
        """Positions held by each row; 0 for one that is not in use."""
        return self._cache.lengths()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are held."""
        return self._cache.bytes()

    def add(self, count: int = 1, like: int | None = None) -> list[int]:
        """New rows, empty or copies of row `like`; returns their indices.

        Raises:
            RuntimeError: there is no room.  ValueError: `like` is not in use.
        """
        if not isinstance(count, int) or not 0 <= count < 2**31:
            raise ValueError(f"add: count is {count!r}; expected an int, how many rows")
        if like is not None:
            self._check_rows("add", [like])
        return self._cache.add(count, like)

    def reorder(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Row rows[i] becomes a copy of what row sources[i] was. What they share is held once."""
        if len(rows) != len(sources) or len(set(rows)) != len(rows):
            raise ValueError(
                f"reorder: rows {list(rows)} and sources {list(sources)}; expected as many, rows without repeats"
            )
        self._check_rows("reorder", [*rows, *sources])
        self._cache.copy(list(rows), list(sources))

    def truncate(self, row: int, length: int) -> None:
        """Forget what lies behind the first `length` positions of a row."""
        self._check_rows("truncate", [row])
        if not isinstance(length, int) or not 0 <= length <= self.max_len:
            raise ValueError(f"truncate: length is {length!r}; expected 0 to what row {row} holds")
        self._cache.truncate(row, length)

    def release(self, row: int) -> None:
        """Free a row and what it holds; its index may be given out again."""
        self._check_rows("release", [row])
        self._cache.release(row)

    @overload
    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], last_only: Literal[True] = True
    ) -> Tensor: ...

    @overload
    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], last_only: Literal[False]
    ) -> list[Tensor]: ...

    @overload
    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], last_only: bool = True
    ) -> Tensor | list[Tensor]: ...

    def extend(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], last_only: bool = True
    ) -> Tensor | list[Tensor]:
        """Append tokens to rows, ragged, at least one each.

        Args:
            rows: which, without repeats.
            tokens: of each of them, in [0, V).
            last_only: whether only the logits behind the last token of each row are wanted.
        Returns:
            fp32 logits, (len(rows), V); with last_only=False a list of (len(tokens[i]), V).
        Raises:
            ValueError: a row that is not in use or has no room, no tokens, or ids outside the vocabulary.
        """
        rows, counts = list(rows), [len(t) for t in tokens]
        self._check_rows("extend", rows)
        flat = [int(token) for row in tokens for token in row]
        self._check_tokens(rows, counts, flat)
        V = self.config.vocab_size
        panels = _empty_panels(len(rows) if last_only else len(flat), V)  # fresh: the caller may keep what it got
        self._check_weights()
        self._cache.extend(rows, counts, flat, last_only, to_dlpack(panels))
        self._check_weights()
        logits = panels[:, :V]
        return logits if last_only else list(logits.split(counts))

    def decode(
        self,
        rows: Sequence[int],
        logits: Tensor,
        *,
        steps: int,
        more: bool,
        samplings: Sequence[Sampling],
        ends: Sequence[int] = (),
    ) -> list[list[int]]:
        """Draw and append tokens without coming back to Python in between.

        Args:
            rows: which, without repeats.
            logits: from `empty_logits`; row i those of the last position of rows[i]. Afterwards row i is of the i-th row
                that has not ended.
            steps: how many tokens to draw for each row; fewer where it ends.
            more: whether the very last token of each row is appended too (more are to be drawn).
            samplings: how the tokens of each row are drawn.
            ends: the tokens that end a row.
        Returns:
            The new tokens of each row, an end token among them; they are those that `ops.sample` draws. A draw that
            fails, which `draw` tells how, is the last for all.
        Raises:
            ValueError: a row that is not in use, is there twice or has no room; logits that are not as said.
        """
        rows = list(rows)
        self._check_rows("decode", rows)
        if not isinstance(steps, int) or not 1 <= steps <= 2**31:
            raise ValueError(f"decode: steps is {steps!r}; expected an int of at least 1")
        panels = to_dlpack(_panels_of(logits, len(rows), self.config.vocab_size))
        self._check_weights()
        new = self._cache.decode(rows, list(samplings), list(ends), steps, more, panels)
        self._check_weights()
        return new

    def interrupt(self) -> None:
        """From any thread: a `decode` with more=False that runs now, or the next one, ends behind its next token."""
        self._cache.interrupt()

    def draw(self, logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
        """One token for each row of logits, (rows, V) fp32; see `gptfast.generation.runner.Sequences.draw`."""
        if tuple(logits.shape) != (len(samplings), self.config.vocab_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"draw: logits has shape {tuple(logits.shape)}, {logits.dtype}; expected ({len(samplings)}, "
                f"{self.config.vocab_size}), torch.float32"
            )
        logits = logits if logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1] else logits.contiguous()
        return self._core.draw(list(samplings), list(positions), to_dlpack(logits))

    def _check_rows(self, what: str, rows: Sequence[int]) -> None:
        """What the numbers alone tell; whether rows are in use and have room is known under the engine's lock only."""
        for row in rows:
            if not isinstance(row, int) or not 0 <= row < self.capacity:
                raise ValueError(f"{what}: row {row} is not in use; rows come from add() and end with release()")

    def _check_tokens(self, rows: list[int], counts: list[int], flat: list[int]) -> None:
        V = self.config.vocab_size
        if not rows or len(counts) != len(rows) or min(counts) < 1 or len(set(rows)) != len(rows):
            raise ValueError(
                f"extend: rows {rows} with {counts} tokens; expected different rows with at least one token each"
            )
        if min(flat) < 0 or max(flat) >= V:
            raise ValueError(f"extend: token ids {min(flat)} to {max(flat)}; expected ids in [0, {V}), the vocabulary")


def empty_logits(rows: int, V: int) -> Tensor:
    """A (rows, V) fp32 tensor that the engine can write to: it writes whole panels."""
    return _empty_panels(rows, V)[:, :V]


def _empty_panels(rows: int, V: int) -> Tensor:
    # whatever torch's default dtype and device are: the engine writes floats to the memory of the CPU
    return torch.empty(rows, _in_panels(V), dtype=torch.float32, device="cpu")


def _in_panels(V: int) -> int:
    return (V + PANEL - 1) // PANEL * PANEL


def _panels_of(logits: Tensor, rows: int, V: int) -> Tensor:
    """The panels behind logits (rows, V) that `empty_logits` made, or a slice of whose rows it is."""
    fits = (
        isinstance(logits, Tensor)
        and (logits.dtype, logits.device.type) == (torch.float32, "cpu")
        and logits.dim() == 2
        and logits.shape[0] >= rows
        and logits.shape[1] == V
        and logits.stride(1) == 1
    )
    width, ld = _in_panels(V), logits.stride(0) if fits else 0
    room = logits.untyped_storage().nbytes() // 4 - logits.storage_offset() if fits else 0
    if not fits or (rows and (ld < width or (rows - 1) * ld + width > room)):
        got = f"{tuple(logits.shape)}, {logits.dtype}" if isinstance(logits, Tensor) else repr(logits)
        raise ValueError(
            f"decode: logits is {got}; expected what `extend` or `empty_logits` returned for these rows, ({rows}, {V})"
        )
    return logits.as_strided((rows, width), (max(ld, width), 1))
