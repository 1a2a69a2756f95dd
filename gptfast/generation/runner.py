"""The interface between generation and a model: `Runner`, and the `LanguageModel` that makes one.  V vocabulary."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.generation.sampling import SamplingParams, sample_rows


class LanguageModel(Protocol):
    """What generation needs of a model: `GPT`, `CompiledGPT`, or a `Runner`."""

    @property
    def config(self) -> GPTConfig:
        """Generation reads vocab_size and block_size."""
        ...

    def runner(self, max_slots: int, max_len: int) -> Runner:
        """The fastest runner that can run the model as it is now.

        Args:
            max_slots: number of sequences at a time.
            max_len: number of positions of a sequence, at most block_size.
        """
        ...


class Runner(ABC):
    """Runs a model on sequences: each occupies a slot, with the keys and values of its tokens.

    A runner is for the model as it was when the runner was made: its weights, its modules, the backend that was chosen.
    `EngineRunner` has a copy of the weights. `TorchRunner` and `CudaGraphRunner` read the model's own, so change these only
    between runs; for a model that has changed make a new runner.

    Slots are small integers that `allocate` and `fork` return. Several threads may call a runner; calls take turns.

    config: of the model.
    own_threads: whether the model computes on its own threads instead of torch's.
    repeats_exactly: whether logits are the same bits however the tokens of a sequence are split over calls.
    """

    config: GPTConfig
    own_threads = False
    repeats_exactly = False

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Number of positions in each slot, without virtual tokens; 0 for a free slot."""

    def virtual_tokens(self, adapter: str | None = None) -> int:
        """See `virtual_tokens`."""
        return 0

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that slots may have."""
        return ()

    @property
    def adapters_enabled(self) -> bool:
        """Whether slots have the adapters that they name. False: all of them run on the base alone (`disable_adapters`)."""
        return True

    @abstractmethod
    def allocate(self, count: int = 1, adapter: str | None = None, prefix: Tensor | None = None) -> list[int]:
        """Take `count` empty slots.

        Args:
            prefix: (n, C) vectors before the tokens of each slot, behind its soft prompt. They take room in block_size;
                `lengths` leave them out.
            adapter: of the slots, and of the copies of them: a name, or "__base__" for none. None: those that are active.
        Raises:
            RuntimeError: fewer are free.  ValueError: there is no such adapter.
        """

    @abstractmethod
    def fork(self, slot: int, count: int) -> list[int]:
        """Take `count` slots that hold copies of `slot`.

        Raises:
            RuntimeError: fewer are free.  ValueError: `slot` is not in use.
        """

    @abstractmethod
    def copy(self, slots: Sequence[int], sources: Sequence[int]) -> None:
        """Make slots[i] a copy of what sources[i] was before the call. slots: distinct; both: in use."""

    @abstractmethod
    def truncate(self, slot: int, length: int) -> None:
        """Keep the first `length` positions of a slot."""

    @abstractmethod
    def free(self, slot: int) -> None:
        """Give a slot back."""

    @overload
    def extend(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], last_only: Literal[True] = True
    ) -> Tensor: ...

    @overload
    def extend(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], last_only: Literal[False]
    ) -> list[Tensor]: ...

    @abstractmethod
    def extend(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], last_only: bool = True
    ) -> Tensor | list[Tensor]:
        """Append tokens[i], at least one token, to slots[i].

        Args:
            slots: distinct slots in use.
            last_only: return the logits of the last token of each slot only.
        Returns:
            fp32 logits: (len(slots), V), or with last_only=False a list of (len(tokens[i]), V). The caller may keep them.
        Raises:
            ValueError: a slot that is not in use or is full, no tokens, or ids outside the vocabulary.
        """

    @abstractmethod
    def runner(self, max_slots: int, max_len: int) -> Runner:
        """Another runner for the same model with the same weights, so that a runner is itself a `LanguageModel`."""

    def sample(self, logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
        """Draw a token from each row of logits, (B, V) fp32; see `sample_rows`."""
        return sample_rows(logits, params, positions)

    def decode_steps(
        self,
        slots: Sequence[int],
        logits: Tensor,
        max_tokens: int,
        params: Sequence[SamplingParams],
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Draw 1 to `max_tokens` tokens for each slot, and append all but the last of each.

        This draws one. Runners that can draw several without returning to Python override it.

        Args:
            slots: distinct slots in use.
            logits: what `extend` returned for these slots; may be overwritten.
            max_tokens: at least 1.
            params: sampling parameters of each slot; positions are the lengths of the slots.
            stop_ids: tokens after which a slot gets no more.
        Returns:
            The new tokens of each slot. The last may be a key of `SAMPLING_ERRORS`; other slots may then get fewer.
        """
        lengths = self.lengths
        return [[token] for token in self.sample(logits, params, [lengths[slot] for slot in slots])]

    def interrupt(self) -> None:  # noqa: B027 (one token a call leaves nothing to interrupt)
        """Thread-safe: make a running `decode_steps`, or the next one, return after its current token, if it draws many."""


def virtual_tokens(model: LanguageModel, adapter: str | None = None) -> int:
    """Number of virtual tokens before those of a sequence. They take room in block_size; the `lengths` of a runner leave them
    out. adapter: of the sequence; None: the active ones."""
    of = getattr(model, "virtual_tokens", None)
    return 0 if of is None else of(adapter)


@contextmanager
def single_threaded_torch(runner: Runner) -> Iterator[None]:
    """Limit torch to one thread inside, if the runner has its own threads.

    After a parallel op torch's OpenMP threads spin for up to hundreds of milliseconds, on cores that the runner's threads
    need. torch's limit is global; see `torch_num_threads` for threads that start inside.
    """
    global _unlimited
    threads = torch.get_num_threads()
    if threads == 1 or not runner.own_threads:
        yield
        return
    _unlimited = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_unlimited = 0  # torch's thread count when `single_threaded_torch` last limited it; 0: never


def torch_num_threads() -> int:
    """torch's thread count outside `single_threaded_torch`: a thread that first uses torch inside it inherits the limit."""
    if _unlimited and threading.current_thread() is not threading.main_thread():
        return _unlimited
    return torch.get_num_threads()
