"""Dashboards that plot the log of a run while it trains: TensorBoard, Weights & Biases, Trackio, each through its own package."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from gptfast._checks import check_choice
from gptfast._files import atomic_write

BOARDS = ("tensorboard", "wandb", "trackio")
_PROJECT = "gptfast"


class Board(ABC):
    """Plots numbers over the steps of a run."""

    @abstractmethod
    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers of a step, by name."""

    @abstractmethod
    def back_to(self, step: int) -> None:
        """Prepare for a run that goes back to a step: later steps are logged again."""

    @abstractmethod
    def close(self) -> None:
        """Flush and close; nothing can be logged afterwards."""


def open_board(name: str, out: Path, step: int, config: dict[str, Any]) -> Board:
    """The board of a run.

    Args:
        name: one of `BOARDS`.
        out: RUN; TensorBoard's files go to RUN/tensorboard.
        step: the last step before this process, 0 for a new run.
        config: the options of the run, which the dashboard shows.
    Raises:
        ValueError: another name.  ImportError: its package is not installed.
    """
    check_choice("Trainer", "log_to", name, BOARDS)
    if name == "tensorboard":
        return _TensorBoard(out / "tensorboard", step)
    return _Hosted(name, out, step, config)


def _package(name: str) -> Any:
    try:
        if name == "tensorboard":
            import torch.utils.tensorboard as package
        elif name == "wandb":
            import wandb as package  # pyright: ignore[reportMissingImports]
        else:
            import trackio as package  # pyright: ignore[reportMissingImports]
        return package
    except ImportError as error:
        raise ImportError(f"`{name}` needs a package that is not installed: pip install {name}") from error


class _TensorBoard(Board):
    """Event files. Steps that are made again replace those of before (`purge_step`)."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._make = folder, _package("tensorboard").SummaryWriter
        self._open(step)

    def _open(self, step: int) -> None:
        self._writer = self._make(str(self._folder), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def back_to(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


class _Hosted(Board):
    """wandb or trackio, which share one interface. A run keeps its name there: RUN/<program>-run has it."""

    def __init__(self, name: str, out: Path, step: int, config: dict[str, Any]) -> None:
        package, kept = _package(name), out / f"{name}-run"
        if step and kept.exists():
            identity = kept.read_text(encoding="utf-8").strip()
        else:
            identity = f"{out.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
            atomic_write(kept, f"{identity}\n".encode())
        named = {"id": identity, "dir": str(out)} if name == "wandb" else {}
        self._run = package.init(project=_PROJECT, name=identity, config=config, resume="allow", **named)

    def write(self, step: int, values: dict[str, float]) -> None:
        if values:
            self._run.log(values, step=step)

    def back_to(self, step: int) -> None:
        """Do nothing: the service keeps what it has, and ignores further numbers of these steps."""

    def close(self) -> None:
        self._run.finish()
