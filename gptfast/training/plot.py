"""The loss curve of a run, and the load of its experts, as PNG files."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from gptfast._files import as_drawn, save_figure

EXPERTS = "experts.png"  # in the folder of a run


def require_matplotlib() -> None:
    """Raise ImportError if matplotlib is missing; training calls this before its first step."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the loss curve needs a package that is not installed: pip install matplotlib")


def plot_losses(
    records: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str = "", metric: str = ""
) -> None:
    """Draw training and validation loss over the steps, and a metric above them.

    Args:
        records: records of the log, with "loss" or "val_loss".
        path: the PNG file, written atomically.
        title: the title of the plot.
        metric: its name in the records; "": none. With one the loss of the task, "task_loss", is drawn where there is one.
    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7 if metric else 5), layout="constrained")
    axes = figure.subplots(2 if metric else 1, 1, sharex=True, squeeze=False)[:, 0]
    if metric:
        _draw(axes[0], records, [(metric, "validation", "#b23a48")])
        axes[0].set(ylabel=metric.replace("_", " "))
    training = "task_loss" if any("task_loss" in r for r in records) else "loss"
    _draw(axes[-1], records, [(training, "training (one batch)", "#9db4c0"), ("val_loss", "validation", "#b23a48")])
    axes[-1].set(xlabel="step", ylabel="loss" if metric else "loss, nats per token")
    axes[0].set(title=as_drawn(title))
    save_figure(figure, path)


def _draw(axis: Any, records: Sequence[dict[str, Any]], curves: Sequence[tuple[str, str, str]]) -> None:
    """Draw curves (key, label, colour); those of evaluations with a point at each."""
    for key, label, color in curves:
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            marker = "o" if label == "validation" else None
            axis.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3, linewidth=1.2)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def plot_experts(records: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the load of each expert over the steps, a panel for each layer: dark where it gets no tokens.

    Args:
        records: records of the log; where none has "expert_load" nothing is drawn.
        path, title: as in `plot_losses`.
    Raises:
        ImportError, OSError: as `plot_losses`.
    """
    points = [(r["step"], r["expert_load"]) for r in records if "expert_load" in r]
    if not points:
        return
    require_matplotlib()
    from matplotlib.figure import Figure

    layers, experts = len(points[0][1]), len(points[0][1][0])
    columns = min(4, layers)
    rows = -(-layers // columns)
    figure = Figure(figsize=(2.6 * columns + 1.4, 1.9 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    steps = [step for step, _ in points]
    edges = [steps[0] - 1, *steps]  # a load is shown from the record before to its own
    colours = {"vmin": 0.0, "vmax": min(1.0, 2 / experts), "cmap": "viridis"}
    for layer, axis in enumerate(axes.flat):
        if layer >= layers:
            axis.set_visible(False)
            continue
        loads = [[load[layer][expert] for _, load in points] for expert in range(experts)]
        drawn = axis.pcolormesh(edges, range(experts + 1), loads, **colours)
        axis.set_title(f"layer {layer}", fontsize=9)
        if layer % columns == 0:
            axis.set(ylabel="expert")
        if layer + columns >= layers:
            axis.set(xlabel="step")
            axis.tick_params(labelbottom=True)
    figure.colorbar(drawn, ax=axes, label=f"share of the layer's tokens (even: {1 / experts:.3g})", extend="max")
    figure.suptitle(as_drawn(title), fontsize=10)
    save_figure(figure, path)
