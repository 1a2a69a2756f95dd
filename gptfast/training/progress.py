"""The progress display of training: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINE_SECONDS = 10.0  # between plain lines
# The columns of the bar after "step 1234/20000", and the terminal width that each needs.
_FROM_WIDTH = {"bar": 100, "loss": 0, "val": 52, "speed": 68, "peak": 80, "left": 0}


@dataclass
class Figures:
    """The figures of a step; None: not known yet."""

    step: int
    total: int | None
    loss: float
    val_loss: float | None
    tokens_per_second: float | None
    percent_of_peak: float | None
    seconds_left: float | None
    val_is_new: bool = True  # val_loss is of this step
    metric: str = ""  # beside val_loss

    def columns(self) -> dict[str, str]:
        val = "" if self.val_loss is None else f"val {self.val_loss:.4f}  {self.metric}".rstrip()
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"
        peak = "" if self.percent_of_peak is None else f"{self.percent_of_peak:.0f}% of peak"
        left = "" if self.seconds_left is None else f"ETA {clock(self.seconds_left)}"
        return {"loss": f"loss {self.loss:.4f}", "val": val, "speed": speed, "peak": peak, "left": left}

    def line(self) -> str:
        total = "?" if self.total is None else self.total
        shown = [text for name, text in self.columns().items() if text and (name != "val" or self.val_is_new)]
        return "  ".join([f"step {self.step}/{total}", *shown])


def clock(seconds: float) -> str:
    """A duration such as 1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingProgress:
    """A context manager that shows `Figures`.

    Args:
        enabled: False: show nothing.
        console: the console to write to; None: standard output.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._enabled = enabled
        self._live = enabled and self.console.is_terminal
        fitting = [name for name, width in _FROM_WIDTH.items() if self.console.width >= width]
        columns = {name: TextColumn(f"{{task.fields[{name}]}}") for name in fitting if name != "bar"}
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            *([BarColumn(bar_width=None)] if "bar" in fitting else []),
            *columns.values(),
            console=self.console,
            disable=not self._live,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=None, loss="", val="", speed="", peak="", left="")
        self._last_line = -math.inf

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, figures: Figures, important: bool = False) -> None:
        """Update the bar. Without a bar print a line, if `important` or if the last one is ten seconds old."""
        if self._live:
            columns: dict[str, Any] = figures.columns()
            self._bar.update(self._task, completed=figures.step, total=figures.total, **columns)
        elif self._enabled and (important or time.monotonic() - self._last_line >= _LINE_SECONDS):
            self._last_line = time.monotonic()
            self.note(figures.line())

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._enabled:
            self.console.print(text, markup=False, highlight=False)
