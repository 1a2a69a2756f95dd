"""EngineRunner: the `Runner` of the native CPU engine.  V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

from gptfast._checks import check_count
from gptfast.config import GPTConfig
from gptfast.engine.adapters import PackedAdapters
from gptfast.generation.runner import Runner
from gptfast.generation.sampling import SamplingParams

LARGEST, SLOTS = 2**31 - 1, " (the number of slots)"  # of a count
PANEL = 32  # the engine writes logits in whole panels of this many columns


class EngineRunner(Runner):
    """Runs a `CompiledGPT`. Copies of a slot share the pages of keys and values that neither has written to since.

    The logits of a sequence depend on its own tokens alone, bit for bit: not on the other slots of a call, nor on how its
    tokens are split over calls.

    Args:
        core: the `gptfast._C.Engine`.
        config: of the model.
        max_slots: number of sequences at a time.
        max_len: number of positions of a sequence, at most block_size; None: block_size.
        check_weights: called before and after the weights are read; raises where they have changed.
        another: makes another runner for the same weights and adapters.
        adapters: that slots may have.
    Raises:
        ValueError: max_slots or max_len out of range.  MemoryError: no memory for max_slots.
    """

    own_threads = True
    repeats_exactly = True

    def __init__(
        self,
        core: Any,
        config: GPTConfig,
        max_slots: int,
        max_len: int | None,
        check_weights: Callable[[], None],
        another: Callable[[int, int], Runner],
        adapters: PackedAdapters | None = None,
    ) -> None:
        from gptfast import _C

        self.config, self.max_slots = config, max_slots
        self.max_len = config.block_size if max_len is None else max_len
        self._check_weights, self._another = check_weights, another
        self._adapters = adapters or PackedAdapters()
        check_count("runner", "max_len", self.max_len, 1, config.block_size, " (the model's block_size)")
        try:
            self._core, self._cache = core, _C.Cache(core, max_slots, self.max_len)
        except (MemoryError, TypeError):  # TypeError: beyond 64 bits
            raise MemoryError(f"runner: no memory for max_slots = {max_slots}; run fewer sequences at a time") from None

    @property
    def lengths(self) -> list[int]:
        return self._cache.lengths()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are held."""
        return self._cache.bytes()

    def runner(self, max_slots: int, max_len: int) -> Runner:
        return self._another(max_slots, max_len)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters.packed)

    @property
    def adapters_enabled(self) -> bool:
        return self._adapters.enabled

    def allocate(self, count: int = 1, adapter: str | None = None, prefix: Tensor | None = None) -> list[int]:
        check_count("allocate", "count", count, 0, LARGEST, SLOTS)
        updates, prompt = self._adapters.of("allocate", adapter)
        if prefix is not None:
            own = prefix.detach().to("cpu", torch.float32).contiguous()
            prompt = own if prompt is None else torch.cat((prompt, own))
        slots = self._cache.add(count, updates)
        if prompt is not None and slots:
            first, *others = slots
            try:
                self._cache.prefix(first, to_dlpack(prompt))
                self._cache.copy(others, [first] * len(others))
            except BaseException:
                for slot in slots:
                    self._cache.release(slot)
                raise
        return slots

    def virtual_tokens(self, adapter: str | None = None) -> int:
        return self._adapters.virtual_tokens(adapter)

    def fork(self, slot: int, count: int) -> list[int]:
        self._check_slots("fork", [slot])
        check_count("fork", "count", count, 0, LARGEST, SLOTS)
        return self._cache.fork(count, slot)

    def copy(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        if len(slots) != len(sources) or len(set(slots)) != len(slots):
            raise ValueError(
                f"copy: slots {list(slots)} and sources {list(sources)}; expected as many, and distinct slots"
            )
        self._check_slots("copy", [*slots, *sources])
        self._cache.copy(list(slots), list(sources))

    def truncate(self, slot: int, length: int) -> None:
        self._check_slots("truncate", [slot])
        if not isinstance(length, int) or not 0 <= length <= self.max_len:
            raise ValueError(f"truncate: length is {length!r}; expected 0 to the length of slot {slot}")
        self._cache.truncate(slot, length)  # which may read tokens of banded layers again
        if self.config.is_banded:
            self._check_weights()

    def free(self, slot: int) -> None:
        self._check_slots("free", [slot])
        self._cache.release(slot)

    def extend(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], last_only: bool = True
    ) -> Tensor | list[Tensor]:
        slots, counts = list(slots), [len(new) for new in tokens]
        self._check_slots("extend", slots)
        flat = [int(token) for new in tokens for token in new]
        self._check_tokens(slots, counts, flat)
        logits = empty_logits(len(slots) if last_only else len(flat), self.config.vocab_size)  # the caller may keep it
        self._check_weights()
        self._cache.extend(slots, counts, flat, last_only, to_dlpack(_panels_of(logits)))
        self._check_weights()
        return logits if last_only else list(logits.split(counts))

    def decode_steps(
        self,
        slots: Sequence[int],
        logits: Tensor,
        max_tokens: int,
        params: Sequence[SamplingParams],
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """See `Runner.decode_steps`. After an error code no slot gets more tokens."""
        slots = list(slots)
        self._check_slots("decode_steps", slots)
        if not isinstance(max_tokens, int) or not 1 <= max_tokens <= 2**31:
            raise ValueError(f"decode_steps: max_tokens is {max_tokens!r}; expected an int of at least 1")
        panels = to_dlpack(self._checked_panels(logits, len(slots)))
        self._check_weights()
        new = self._cache.decode(slots, list(params), list(stop_ids), max_tokens, panels)
        self._check_weights()
        return new

    def interrupt(self) -> None:
        self._cache.interrupt()

    def sample(self, logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
        """See `gptfast.generation.sampling.sample_rows`; on the engine's threads."""
        if tuple(logits.shape) != (len(params), self.config.vocab_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"sample: logits has shape {tuple(logits.shape)}, {logits.dtype}; expected ({len(params)}, "
                f"{self.config.vocab_size}), torch.float32"
            )
        logits = logits if logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1] else logits.contiguous()
        return self._core.draw(list(params), list(positions), to_dlpack(logits))

    def _check_slots(self, what: str, slots: Sequence[int]) -> None:
        """Check the numbers alone. Whether slots are in use and have room is known only under the engine's lock."""
        for slot in slots:
            if not isinstance(slot, int) or not 0 <= slot < self.max_slots:
                raise ValueError(
                    f"{what}: slot {slot} is not in use; slots come from allocate() and fork() and end with free()"
                )

    def _check_tokens(self, slots: list[int], counts: list[int], flat: list[int]) -> None:
        V = self.config.vocab_size
        if not slots or len(counts) != len(slots) or min(counts) < 1 or len(set(slots)) != len(slots):
            raise ValueError(
                f"extend: slots {slots} with {counts} tokens; expected distinct slots with at least one token each"
            )
        if min(flat) < 0 or max(flat) >= V:
            raise ValueError(f"extend: token ids {min(flat)} to {max(flat)}; expected ids in [0, {V}), the vocabulary")

    def _checked_panels(self, logits: Tensor, rows: int) -> Tensor:
        """The panels of logits (rows, V) that `extend` returned, or of a slice of its rows."""
        V = self.config.vocab_size
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
                f"decode_steps: logits is {got}; expected what `extend` returned for these slots, ({rows}, {V})"
            )
        return logits.as_strided((rows, width), (max(ld, width), 1))


def empty_logits(rows: int, V: int) -> Tensor:
    """A (rows, V) fp32 tensor that the engine can write to: behind each row there is room for the rest of its last panel."""
    # on the CPU, whatever torch's default device and dtype are
    return torch.empty(rows, _in_panels(V), dtype=torch.float32, device="cpu")[:, :V]


def _panels_of(logits: Tensor) -> Tensor:
    return logits.as_strided((logits.shape[0], logits.stride(0)), (logits.stride(0), 1))


def _in_panels(V: int) -> int:
    return (V + PANEL - 1) // PANEL * PANEL
