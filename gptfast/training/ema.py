"""An exponential moving average of the weights, which is evaluated, saved and resumed beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gptfast._files import open_read
from gptfast._folders import staged_folder
from gptfast._snapshots import EVERYTHING, current
from gptfast.training.copies import Copies
from gptfast.training.objective import Objective

NAME = "ema.safetensors"
_UPDATES = "updates"


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after every step; the first step's weights begin it.

    As `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`, whose update is one fused pass.

    Args:
        network: its parameters with requires_grad are averaged, in their dtype.
        decay: in (0, 1); 0.999 averages over about the last thousand steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._weights = list(self._named.values())
        self._average: list[Tensor] = [p.detach().clone() for p in self._weights]
        self._blend, self.updates = get_ema_multi_avg_fn(decay), 0

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the present weights."""
        if self.updates:
            self._blend(self._average, [p.detach() for p in self._weights], self.updates)
        else:
            for average, p in zip(self._average, self._weights, strict=True):
                average.copy_(p)
        self.updates += 1

    @contextmanager
    def in_the_network(self) -> Iterator[None]:
        """Context in which the network's weights are the average; afterwards they are its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, average in zip(self._weights, self._average, strict=True):
            kept = p.detach().clone()
            p.copy_(average)
            average.copy_(kept)

    def tensors(self, copies: Copies | None) -> dict[str, Tensor]:
        """The content of `ema.safetensors`. copies: take copies, so that later updates do not change the tensors."""
        named = zip(self._named, self._average, strict=True)
        found = {name: x if copies is None else copies.take(x) for name, x in named}
        return {**found, _UPDATES: torch.tensor(self.updates)}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore the average from a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint has none.
            ValueError: the file is damaged, or belongs to another model.
        """
        path = current(folder, NAME)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the run in {folder} kept no average of the weights (`ema`)")
        open_read(path).close()  # its errors name the file
        try:
            found = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}); resume from another checkpoint") from error
        for (name, p), average in zip(self._named.items(), self._average, strict=True):
            if name not in found or found[name].shape != p.shape:
                raise ValueError(f"{path}: {name} is missing or has another shape; the file belongs to another model")
            average.copy_(found[name])
        self.updates = int(found[_UPDATES]) if _UPDATES in found else 1


def best_writer(
    average: WeightAverage | None, objective: Objective, folder: Path, copies: Copies | None
) -> Callable[[], None]:
    """A function that writes a checkpoint with the averaged weights.

    Args:
        average: None: the function does nothing.
        objective: writes the model and has the tokenizer.
        folder: of the checkpoint; replaced atomically.
        copies: copy the weights now, so that the function may run in a thread while training goes on.
    """
    if average is None:
        return lambda: None
    inside: Callable[[], AbstractContextManager] = average.in_the_network if copies is None else nullcontext
    with nullcontext() if copies is None else average.in_the_network():
        write = objective.writer(copies)

    def save() -> None:
        with inside(), staged_folder(folder, replaces=EVERYTHING) as stage:
            write(stage)
            if objective.tokenizer is not None:
                objective.tokenizer.save(stage)

    return save
