"""Dropout whose masks are a pure function of (seed, offset)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gptfast import ops, rng

_instances = itertools.count()
_STEP = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads consecutive numbers over the seeds, as SplitMix64 does


class DropoutCounter:
    """The (seed, offset) of the next dropout."""

    def __init__(self, seed: int | None = None) -> None:
        instance = next(_instances) if seed is None else 0
        self.seed = instance * _STEP % 2**64 if seed is None else rng.check_counter("Dropout", "seed", seed, 64)
        self.offset = 0

    def take(self, n: int = 1) -> tuple[int, int]:
        """(seed, first of n fresh offsets)."""
        if torch.compiler.is_compiling():
            # torch.compile takes an integer reached through a module for a constant: a graph per step
            with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
                first = self.offset
                self.offset = first + n
        else:
            first = self.offset
            self.offset = first + n
        return self.seed, first


class Dropout(torch.nn.Dropout):
    """Drop-in for `torch.nn.Dropout`, through `gptfast.ops.dropout`: the same masks on every device.

    Call number n of a module uses mask (seed, offset = n); `module.counter` holds both and may be set. They
    are not in the state_dict, which stays that of torch (empty).

    Args:
        p, inplace: as in torch; with inplace=True the result is written over the input.
        seed: in [0, 2**64). None numbers the instances of the process in the order of their construction, so
            that no two share a mask. torch.manual_seed has no influence; see `seed_dropout` to seed a whole
            model.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, seed: int | None = None) -> None:
        super().__init__(p, inplace)
        self.counter = DropoutCounter(seed)

    def forward(self, input: Tensor) -> Tensor:
        """Dropout of every element in training mode, the input itself otherwise; any shape."""
        if not self.training or self.p == 0:
            return input
        seed, offset = self.counter.take()
        rows = input if input.dim() else input[None]
        out = ops.dropout(rows, self.p, seed, offset).view(input.shape)
        return input.copy_(out) if self.inplace else out


def seed_dropout(model: torch.nn.Module, seed: int) -> None:
    """Restart the dropout of every standalone gptfast module inside `model` from `seed`, each with its own
    masks.

    A `gptfast.GPT` numbers its dropouts itself: set its `dropout_seed` and `dropout_step` instead.

    Args:
        model: any module.
        seed: in [0, 2**64).
    """
    rng.check_counter("seed_dropout", "seed", seed, 64)
    found = [vars(module).get("counter") for module in model.modules()]
    counters = [counter for counter in found if isinstance(counter, DropoutCounter)]
    for number, counter in enumerate(counters):
        counter.seed, counter.offset = (seed + number * _STEP) % 2**64, 0
