"""TorchRunner: runs a model in torch over one KV cache.  B sequences, T tokens, V vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gptfast.generation.runner import Runner
from gptfast.nn.adapted import ADAPTED
from gptfast.nn.difference import check_values
from gptfast.nn.kv_cache import KVCache
from gptfast.nn.selection import check_adapter
from gptfast.nn.soft_prompt import prompts_of
from gptfast.nn.transformer import Transformer

# Tokens of one forward, of one prompt or of several: they fill a GPU, and a prompt needs at a time its keys and values, and the
# activations of so many.
PREFILL = 2048


class TorchRunner(Runner):
    """`Runner` of any `Transformer`, on the device of its weights.

    The slots in use lie side by side in rows 0 to n - 1 of the cache, so that a step of all of them is one forward over a
    slice; the last row moves into the place of one that is freed.

    Prompts of one length run together, others one by one, without padding, and single tokens of several sequences together.
    The logits of a sequence do not depend on the others, up to the rounding of matrix products, which libraries do
    differently for different numbers of rows. With GPTFAST_GEMM=own they are equal bit for bit.

    Args:
        model: runs in evaluation mode; its training flags are restored after each call.
        max_slots: number of sequences at a time.
        max_len: number of positions of a sequence, at most block_size.
        cache: with at least this room; None makes one.
    """

    def __init__(self, model: Transformer, max_slots: int, max_len: int, cache: KVCache | None = None) -> None:
        self.config, self._model = model.config, model
        self.max_slots, self.max_len = max_slots, max_len
        self._cache = cache or make_cache(model, max_slots, max_len)
        self._virtual = most_virtual_tokens(model)
        self._lengths = [0] * max_slots
        self._slot_in: list[int] = []  # the slot in each row of the cache that is in use
        self._row_of: dict[int, int] = {}
        self._adapter_of: dict[int, str | None] = {}
        self._prefix_of: dict[int, int] = {}  # number of vectors before the tokens of a slot, where there are some
        self._free = list(range(max_slots))[::-1]
        self._lock = threading.RLock()

    @property
    def lengths(self) -> list[int]:
        return self._lengths

    @property
    def adapters(self) -> tuple[str, ...]:
        state = self._model.adapters
        attached = any(isinstance(m, ADAPTED) for m in self._model.modules()) or prompts_of(self._model)
        return state.names if state is not None and attached else ()

    @property
    def adapters_enabled(self) -> bool:
        return self._model.adapters is None or self._model.adapters.enabled

    def virtual_tokens(self, adapter: str | None = None) -> int:
        return self._model.virtual_tokens(adapter)

    def allocate(self, count: int = 1, adapter: str | None = None, prefix: Tensor | None = None) -> list[int]:
        names = () if adapter is None else self.adapters
        if adapter is not None:
            check_adapter("allocate", names, adapter)
        with self._lock:
            if count > len(self._free):
                raise RuntimeError(
                    f"allocate: {count} more slots, but {len(self._free)} of {self.max_slots} are free; free some, or make a "
                    "runner with more"
                )
            slots = [self._free.pop() for _ in range(count)]
            for slot in slots:
                self._row_of[slot] = len(self._slot_in)
                self._slot_in.append(slot)
                self._adapter_of[slot] = adapter if names else None
            if prefix is not None:
                self._read_prefix(slots, prefix)
            return slots

    def fork(self, slot: int, count: int) -> list[int]:
        with self._lock:
            self._check("fork", [slot])
            slots = self.allocate(count)
            self.copy(slots, [slot] * count)
            return slots

    def copy(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        with self._lock:
            self._check("copy", slots)
            self._check("copy", sorted(set(sources)))
            moves = [(slot, source) for slot, source in zip(slots, sources, strict=True) if slot != source]
            if not moves:
                return
            lengths = [self._lengths[source] for _, source in moves]
            adapters = [self._adapter_of[source] for _, source in moves]
            before = [self._prefix_of.get(source, 0) for _, source in moves]
            to, of = ([self._row_of[slot] for slot in part] for part in zip(*moves, strict=True))
            self._cache.copy_rows(to, of, max(map(sum, zip(lengths, before, strict=True))) + self._virtual)
            for (slot, _), length, adapter, n in zip(moves, lengths, adapters, before, strict=True):
                self._lengths[slot], self._adapter_of[slot], self._prefix_of[slot] = length, adapter, n

    def truncate(self, slot: int, length: int) -> None:
        with self._lock:
            self._check("truncate", [slot])
            if not 0 <= length <= self._lengths[slot]:
                raise ValueError(f"truncate: length is {length}; slot {slot} holds {self._lengths[slot]} positions")
            self._lengths[slot] = length

    def free(self, slot: int) -> None:
        with self._lock:
            self._check("free", [slot])
            row, last = self._row_of.pop(slot), self._slot_in.pop()
            if last != slot:
                self._cache.copy_rows([row], [len(self._slot_in)], self._held(last) + self._virtual)
                self._row_of[last] = row
                self._slot_in[row] = last
            self._lengths[slot] = 0
            self._prefix_of.pop(slot, None)
            self._free.append(slot)

    def extend(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], last_only: bool = True
    ) -> Tensor | list[Tensor]:
        with self._lock, torch.inference_mode():
            self._check("extend", slots)
            self._check_room(slots, tokens)
            single = [slot for slot, new in zip(slots, tokens, strict=True) if len(new) == 1 and last_only]
            if len(single) == len(slots):
                return self._step(slots, [new[0] for new in tokens])
            new_of, logits = dict(zip(slots, tokens, strict=True)), dict[int, Tensor]()
            if single:
                step = self._step(single, [new_of[slot][0] for slot in single])
                logits.update(zip(single, step[:, None], strict=True))
            for run in self._alike([slot for slot in slots if slot not in logits], new_of, last_only):
                logits.update(
                    zip(run, self._forward(run, [new_of[slot] for slot in run], last_only).float(), strict=True)
                )
            ordered = [logits[slot] for slot in slots]
            return torch.cat(ordered) if last_only else ordered

    def runner(self, max_slots: int, max_len: int) -> Runner:
        return type(self)(self._model, max_slots, max_len)

    def _check(self, what: str, slots: Sequence[int]) -> None:
        """The slots must be in use, and distinct."""
        for slot in slots:
            if slot not in self._row_of:
                raise ValueError(
                    f"{what}: slot {slot} is not in use; slots come from allocate() and fork() and end with free()"
                )
        if len(set(slots)) != len(slots):
            raise ValueError(f"{what}: slots {list(slots)}; expected distinct slots")

    def _check_room(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        counts = [len(new) for new in tokens]
        if not slots or len(counts) != len(slots) or min(counts) < 1:
            raise ValueError(
                f"extend: slots {list(slots)} with {counts} tokens; expected distinct slots with at least one token each"
            )
        for slot, new in zip(slots, tokens, strict=True):
            virtual = self.virtual_tokens(self._adapter_of[slot]) if self._virtual else 0
            virtual += self._prefix_of.get(slot, 0)
            room = min(self.max_len, self._cache.max_len - virtual)
            if self._lengths[slot] + len(new) > room:
                raise ValueError(
                    f"extend: slot {slot} holds {self._lengths[slot]} positions and {len(new)} more do not fit into "
                    f"max_len = {room}"
                )

    def _step(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Append one token to each slot; fp32 logits (len(slots), V)."""
        id_of, order, parts = dict(zip(slots, ids, strict=True)), [], []
        for run in self._neighbours(slots):
            parts.append(self._forward(run, [[id_of[slot]] for slot in run])[:, 0])
            order += run
        logits = parts[0].float() if len(parts) == 1 else torch.cat(parts).float()
        return logits if order == list(slots) else logits[[order.index(slot) for slot in slots]]

    def _alike(self, slots: Sequence[int], new_of: dict[int, Sequence[int]], last_only: bool) -> Iterator[list[int]]:
        """The slots that get equally many tokens and run in one forward, of at most PREFILL in all; alone where the
        logits of every token are asked for."""
        for count in dict.fromkeys(len(new_of[slot]) for slot in slots):
            most = max(1, PREFILL // count) if last_only else 1
            for run in self._neighbours([slot for slot in slots if len(new_of[slot]) == count]):
                yield from (run[n : n + most] for n in range(0, len(run), most))

    def _neighbours(self, slots: Sequence[int]) -> Iterator[list[int]]:
        """The slots in the order of their rows in the cache, cut where rows are missing between them, and between those
        with an adapter of their own and those with the active ones, or those that get a soft prompt now and those that have
        theirs."""
        run: list[int] = []
        for slot in sorted(slots, key=self._row_of.__getitem__):
            if run and (self._row_of[slot] != self._row_of[run[-1]] + 1 or self._kind(slot) != self._kind(run[-1])):
                yield run
                run = []
            run.append(slot)
        if run:
            yield run

    def _kind(self, slot: int) -> tuple[bool, bool]:
        """Slots of one kind run in one forward."""
        return self._adapter_of[slot] is None, self._virtual > 0 and self._held(slot) == 0

    def _held(self, slot: int) -> int:
        """Positions of a slot with its prefix, without those of a soft prompt."""
        return self._lengths[slot] + self._prefix_of.get(slot, 0)

    def _read_prefix(self, slots: list[int], prefix: Tensor) -> None:
        """Begin empty slots with these vectors."""
        first, *others = slots
        try:
            self._run([first], prefix[None].to(self._cache.k.device), last_only=True)
        except BaseException:
            for slot in slots:
                self.free(slot)
            raise
        self._prefix_of[first] = len(prefix)
        self.copy(others, [first] * len(others))

    def _forward(self, slots: list[int], tokens: list[Sequence[int]], last_only: bool = False) -> Tensor:
        """Append equally many tokens, (B, T), to slots in neighbouring rows; logits (B, T, V), or (B, 1, V) if last_only."""
        ids = torch.tensor(tokens, dtype=torch.int64, device=self._cache.k.device)
        before, found = [self._lengths[slot] for slot in slots], []
        try:
            for part in ids.split(max(1, PREFILL // len(slots)), 1):
                logits = self._run(slots, part, last_only)
                found = [logits[:, None]] if last_only else [*found, logits]
                for slot in slots:
                    self._lengths[slot] += part.shape[1]
        except BaseException:  # what a part has stored does not count
            for slot, length in zip(slots, before, strict=True):
                self._lengths[slot] = length
            raise
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _run(self, slots: list[int], tokens: Tensor, last_only: bool) -> Tensor:
        """Append ids (B, T), or vectors (B, T, C), to the rows of slots in the cache; logits (B, T, V), or (B, V)."""
        first = self._row_of[slots[0]]
        cache = self._cache.rows(first, first + len(slots), [self._held(slot) for slot in slots])
        before = cache.lengths
        names = [self._adapter_of[slot] for slot in slots]
        own = {} if names[0] is None else {"adapter_names": names}
        given = {"inputs_embeds": tokens} if tokens.is_floating_point() else {"ids": tokens}
        with evaluating(self._model):
            logits = self._model(**given, cache=cache, last_only=last_only, **own)
        if cache.lengths is before:
            raise RuntimeError(
                f"generate: the forward of this {type(self._model).__name__} does not use its cache= argument; pass it on "
                "to GPT's forward, or generate without a cache: call the model on the whole text for every token"
            )
        return logits


def make_cache(model: Transformer, rows: int, max_len: int) -> KVCache:
    """A cache in the dtype and on the device of the model's weights, with the layers that it has."""
    weight = model.wte.weight
    if weight.is_meta:
        check_values("generate", model)
    config = model.config.replace(n_layer=len(model.h)) if len(model.h) != model.config.n_layer else model.config
    room = min(config.block_size, max_len + most_virtual_tokens(model))
    return KVCache(config, rows, room, weight.dtype, weight.device)


def most_virtual_tokens(model: Transformer) -> int:
    """Of the longest soft prompt that a row of the model may have."""
    return max(map(len, prompts_of(model).values()), default=0)


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode without autograd; the training flag of every module is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
