"""What a run trains: a network, the batches of its steps, their loss, and its evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptfast.tokenizer import Tokenizer
from gptfast.training.config import TrainConfig
from gptfast.training.copies import Copies

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Evaluation:
    """loss: of the held-out data. metric: where the objective has one, the larger the better; None: the loss decides.
    figures: others by their names in the log."""

    loss: float
    metric: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[float, float]:
        """The key of an evaluation: the better of two has the larger one. The loss decides between equal metrics. One whose loss
        is not finite is worse than all others, whatever a metric makes of its predictions."""
        first = -self.loss if self.metric is None else self.metric
        return (first, -self.loss) if math.isfinite(self.loss) and math.isfinite(first) else (-math.inf, -math.inf)


class Objective(ABC):
    """What `gptfast.training.loop.Loop` trains.

    network: a module with dropout_seed and dropout_step; its parameters with requires_grad are trained.
    tokenizer: saved with every checkpoint; None: none is.
    metric: name of the metric in the log; "": there is none.
    tokens_per_row: of the data, for the speed.
    """

    network: Any
    tokenizer: Tokenizer | None = None
    metric: str = ""
    tokens_per_row: float

    @abstractmethod
    def batches(self, row: int, config: TrainConfig) -> list[Any]:
        """The batches of the step that begins with row number `row` of the data's endless order: a function of row and
        seed, so that a resumed run sees what an uninterrupted one does."""

    def cut(self, batches: list[Any], step: int, config: TrainConfig) -> list[Any]:
        """The batches of a step, with its rows cut as `sequence_warmup` asks for.

        Raises:
            ValueError: there are no rows that can be cut.
        """
        if not config.sequence_warmup:
            return batches
        raise ValueError(f"{type(self).__name__}: its rows cannot be cut; leave `sequence_warmup` out")

    def batches_of(self, rank: int, row: int, step: int, config: TrainConfig) -> list[Any]:
        """What `cut` returns in the process of that number, for the rows from `row` on."""
        raise NotImplementedError(f"{type(self).__name__} does not know the rows of other processes")

    @abstractmethod
    def add_gradients(self, batches: list[Any], autocast: Autocast, device: torch.device) -> dict[str, Any]:
        """Add the gradient of the batches' mean loss to the parameters'; returns "loss" and other figures for the log: floats
        or tensors."""

    @abstractmethod
    def evaluate(self, batch_size: int, config: TrainConfig, autocast: Autocast, device: torch.device) -> Evaluation:
        """Evaluate on held-out data, the same each time, without dropout; the network keeps its mode."""

    def evaluated_tokens(self, batch_size: int, config: TrainConfig) -> float:
        """Tokens of an evaluation, for the plan of a run by time."""
        return math.nan

    def flops_per_token(self) -> float | None:
        """FLOPs of a step per token, to be compared with the machine's; None: not known."""
        return None

    def where_not_finite(
        self, batches: list[Any], autocast: Autocast, device: torch.device, dropout_step: int | None
    ) -> tuple[str, int]:
        """The first module, or gradient, of a step whose values are not finite, when the step is repeated, "": not known; and the
        process in whose rows it is. All processes call it, and have the same answer."""
        return "", 0

    def keep(self, folder: Path, batches: list[Any], about: dict[str, Any], rank: int = 0) -> str:
        """Write the batches of a step that went wrong, and the network, to a folder; the command that repeats it, "": none. All
        processes call it, and the first one writes.

        rank: the process whose batches they are.
        """
        return ""

    def restore(self, folder: Path) -> None:
        """Give the network the weights of a checkpoint."""
        raise NotImplementedError(f"{type(self).__name__} cannot go back to a checkpoint")

    def write(self, folder: Path) -> None:
        """Write the network to a folder, from which a run can be resumed."""
        self.network.save_pretrained(folder)

    def writer(self, copies: Copies | None) -> Callable[[Path], None]:
        """A function that does what `write` does; with `copies` it writes the network as it is now, in any thread."""
        if copies is not None:
            raise NotImplementedError(f"{type(self).__name__} cannot be written while it is trained")
        return self.write
