"""Dropout whose masks are a pure function of (seed, offset)."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import ops, rng
from gptfast.ops.streams import STEP, DropoutCounter, for_rank

__all__ = ["Dropout", "DropoutCounter", "NumberedDropouts", "seed_dropout"]


class Dropout(torch.nn.Dropout):
    """Drop-in for `torch.nn.Dropout`, through `gptfast.ops.dropout`: the same masks on every device.

    By default every call draws its seed from torch's CPU generator, on whatever device the input is: `torch.manual_seed`
    decides the masks, and activation checkpointing, `fork_rng`, copies, DataLoader workers and ranks behave as with torch's
    own (ranks with equal seeds differ nevertheless; where they must not, as between tensor-parallel ranks, give a seed).

    With a seed, call number n uses the mask (seed, offset = n); `module.counter` holds both and may be set. A deep copy
    continues with a seed drawn for it; a pickled module goes on where it stood. Neither is in the state_dict, which stays
    that of torch (empty).

    Args:
        p, inplace: as in torch; with inplace=True the result is written over the input.
        seed: in [0, 2**64), or None; see `seed_dropout` to seed a whole model.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, seed: int | None = None) -> None:
        super().__init__(p, inplace)
        self.counter = DropoutCounter(seed)

    def forward(self, input: Tensor) -> Tensor:
        """Dropout of every element in training mode, the input itself otherwise; any shape."""
        if not self.training or self.p == 0:
            return input
        seed, offset = self.counter.take()
        out = ops.dropout(input, self.p, seed, offset)
        return input.copy_(out) if self.inplace else out


class NumberedDropouts(torch.nn.Module):
    """A network that numbers its dropouts itself: `_dropout` counts its forwards."""

    _dropout: DropoutCounter

    @property
    def dropout_seed(self) -> int | None:
        """Seed of all dropouts, in [0, 2**64); None: torch's generator decides each forward."""
        return self._dropout.seed

    @dropout_seed.setter
    def dropout_seed(self, value: int | None) -> None:
        self._dropout.seed = value

    @property
    def dropout_step(self) -> int | None:
        """Number of forwards with dropout since the seed was set; None without a seed. Setting it then draws one."""
        return self._dropout.offset

    @dropout_step.setter
    def dropout_step(self, value: int | None) -> None:
        self._dropout.offset = value


def seed_dropout(model: torch.nn.Module, seed: int) -> None:
    """Restart the dropout of every standalone gptfast module inside `model` from `seed`, each with its own
    masks, on every rank of torch.distributed too.

    A `gptfast.GPT` numbers its dropouts itself: set its `dropout_seed` and `dropout_step` instead.

    Args:
        model: any module.
        seed: in [0, 2**64).
    """
    rng.check_counter("seed_dropout", "seed", seed, 64)
    seed = for_rank(seed)
    found = [vars(module).get("counter") for module in model.modules()]
    counters = [counter for counter in found if isinstance(counter, DropoutCounter)]
    for number, counter in enumerate(counters):
        counter.seed, counter.offset = (seed + number * STEP) % 2**64, 0
