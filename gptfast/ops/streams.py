"""The (seed, offset) of a dropout for which the caller gives none: from torch's generator, or from a counter."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from gptfast import rng
from gptfast._when_imported import when_imported
from gptfast.ops._registry import define_python_op

STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads consecutive numbers over the seeds, as SplitMix64 does
_RANK_STEP = 0xD1B54A32D192ED03  # likewise; not STEP, or module 1 of rank 0 would be module 0 of rank 1
REMEMBERED = 4096  # calls of a counter whose numbers a recomputation can get again


def draw_seed() -> int:
    """A seed in [0, 2**63) from torch's CPU generator, for data on any device; every rank gets another one.

    `torch.manual_seed`, `fork_rng`, `get_rng_state` and `set_rng_state` control it, a DataLoader worker has its own, and
    `torch.utils.checkpoint` draws the same one again.
    """
    if torch._C._len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        with _disable_current_modes():  # FakeTensorMode and other modes must not see this draw
            return for_rank(int(torch.empty((), dtype=torch.int64, device="cpu").random_()), 63)
    return for_rank(int(_scratch.word.random_().item()), 63)


class _Scratch(threading.local):
    """A tensor of each thread to draw into: creating one takes longer than the draw."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.word = torch.empty((), dtype=torch.int64, device="cpu")


_scratch = _Scratch()


def for_rank(seed: int, bits: int = 64) -> int:
    """The seed of this process in its torch.distributed group; `seed` itself on rank 0 and outside of a group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return seed
    return (seed + distributed.get_rank() * _RANK_STEP) % 2**bits


def stream(op: str, seed: int | None, offset: int, used: bool, first_row: int = 0, each: int = 1) -> tuple[int, int]:
    """(seed as int64, offset with the first row) of a call of a function; a seed of None is drawn if `used`.

    Args:
        op, seed, offset: of the call.
        used: whether anything is dropped.
        first_row, each: which row of the whole batch the first one is, and how many rows or matrices of the mask each has,
            see `rng.at_row`.

    Raises:
        TypeError, ValueError: not integers in range.
    """
    offset = rng.at_row(op, rng.check_counter(op, "offset", offset), first_row, each)
    if seed is not None:
        return rng.as_int64(rng.check_counter(op, "seed", seed, 64)), offset
    if not used:
        return 0, offset
    return (_traced_take(0, 1)[0] if torch.compiler.is_compiling() else draw_seed()), offset


class DropoutCounter:
    """The (seed, offset) of a module's next dropout.

    seed None, the default: every call draws a seed from torch's generator (`draw_seed`), and offset is None too.
    An integer: call after call takes the offsets 0, 1, … of that seed. Assigning an offset where there is no seed draws
    the seed once.

    A recomputation in backward gets the numbers of the first pass. A copy has a seed of its own; a pickled counter
    continues where it was.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = None if seed is None else rng.check_counter("Dropout", "seed", seed, 64)
        self._offset = 0
        self._register()

    def _register(self) -> None:
        self._taken: OrderedDict[int, tuple[int, int] | None] = OrderedDict()  # of recent calls, by their draws
        self.number = next(_numbers)
        _counters[self.number] = self

    @property
    def seed(self) -> int | None:
        return self._seed

    @seed.setter
    def seed(self, value: int | None) -> None:
        self._seed = None if value is None else rng.check_counter("Dropout", "seed", value, 64)
        if value is None:
            self._offset = 0

    @property
    def offset(self) -> int | None:
        return None if self._seed is None else self._offset

    @offset.setter
    def offset(self, value: int | None) -> None:
        if value is None and self._seed is not None:
            raise TypeError(f"dropout: offset is None beside the seed {self._seed}; expected an integer")
        if value is not None:
            self._offset = rng.check_counter("Dropout", "offset", value)
            self._seed = draw_seed() if self._seed is None else self._seed

    def take(self, n: int = 1) -> tuple[int, int]:
        """(seed, first of n fresh offsets)."""
        if torch.compiler.is_compiling():
            # torch.compile takes an integer reached through a module for a constant: a graph per layer
            with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
                return _traced_take(self.number, n)
        return self._take(n)

    def _take(self, n: int) -> tuple[int, int]:
        drawn = draw_seed()
        if self._seed is None:
            return drawn, 0
        if torch._C._current_graph_task_id() != -1:  # inside of a backward pass
            return self._recall(drawn)
        taken = self._seed, self._offset
        self._offset += n
        # torch.utils.checkpoint restores torch's generator: the draw is the mark by which a call is found again
        self._taken[drawn] = taken if self._taken.get(drawn, taken) == taken else None
        if len(self._taken) > REMEMBERED:
            self._taken.popitem(last=False)
        return taken

    def _recall(self, drawn: int) -> tuple[int, int]:
        taken = self._taken.get(drawn)
        if taken is None:
            several = "two calls had the same state of torch's generator"
            unknown = f"none of the last {REMEMBERED} calls had this state of torch's generator"
            raise RuntimeError(
                f"Dropout: a forward inside of a backward pass, as activation checkpointing makes it, asks for an earlier "
                f"mask of seed {self._seed}, but {several if drawn in self._taken else unknown}; leave the seed out, so "
                "that torch.manual_seed decides the masks, and leave preserve_rng_state on"
            )
        return taken

    def __getstate__(self) -> dict[str, int | None]:
        return {"seed": self._seed, "offset": self._offset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._seed, self._offset = state["seed"], state["offset"]
        self._register()

    def __deepcopy__(self, memo: dict[int, Any]) -> DropoutCounter:
        return DropoutCounter(None if self._seed is None else draw_seed())


_numbers = itertools.count(2)  # 0 and 1 are constants to torch.compile
_counters: WeakValueDictionary[int, DropoutCounter] = WeakValueDictionary()


# ---- torch.compile: taking numbers is one call of an operator, so that it happens when the graph runs ------------------


def _run_take(counter: int, n: int, site: int, *, device: torch.device) -> Tensor:
    found = _counters.get(counter)  # none: a function, or a graph exported by another process
    seed, offset = (draw_seed(), 0) if found is None else found._take(n)
    return torch.tensor([rng.as_int64(seed), offset], dtype=torch.int64, device="cpu")


def _shape_of_take(counter: int, n: int, site: int, *, device: torch.device) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device="cpu")


define_python_op("take_dropout", _run_take, _shape_of_take)
# `site` tells the calls of a graph apart, or one would serve all.
_sites = itertools.count()


def _next_site() -> int:
    return next(_sites)


# Once there is a compiler: importing it takes a second and 110 MB, and most processes compile nothing.
when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(_next_site))


def _traced_take(counter: int, n: int) -> tuple[int, int]:
    taken = torch.ops.gptfast.take_dropout(counter, n, _next_site(), device="cpu")
    with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
        seed, offset = taken[0].item(), taken[1].item()
    return seed, offset
