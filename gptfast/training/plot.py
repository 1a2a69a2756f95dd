"""The loss curve of a run as a PNG file."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Sequence
from typing import Any

from gptfast._files import atomic_write


def require_matplotlib() -> None:
    """Raise ImportError if matplotlib is missing; training calls this before its first step."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the loss curve needs a package that is not installed: pip install matplotlib")


def plot_losses(records: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw training and validation loss over the steps.

    Args:
        records: records of the log, with "loss" or "val_loss".
        path: the PNG file, written atomically.
        title: the title of the plot.
    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    for key, label, style in (("loss", "training (one batch)", "#9db4c0"), ("val_loss", "validation", "#b23a48")):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            marker = "o" if key == "val_loss" else None
            axis.plot(*zip(*points, strict=True), color=style, label=label, marker=marker, markersize=3, linewidth=1.2)
    axis.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
