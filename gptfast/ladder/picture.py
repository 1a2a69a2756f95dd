"""The picture of a ladder: its points and the laws fitted to them, log-log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptfast._files import save_figure
from gptfast.evaluation.scaling import chinchilla_loss, kaplan_loss
from gptfast.ladder.summary import of_compute, of_sizes, of_tokens

_PANELS = (
    # law, x, x_c and alpha, the name of x, the other variable, points of the law
    ("L(N)", "parameters", ("N_c", "alpha_N"), "N, parameters", "tokens", of_sizes),
    ("L(D)", "tokens", ("D_c", "alpha_D"), "D, tokens", "parameters", of_tokens),
    ("L(C)", "flops", ("C_c", "alpha_C"), "C, FLOPs", "parameters", of_compute),
)


def draw_ladder(result: dict[str, Any], path: Path) -> None:
    """Draw what `gptfast.ladder.summarise` returns, as a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2).flat
    points = result["points"]
    for axis, (law, x, names, label, other, chosen) in zip(axes, _PANELS, strict=False):
        _draw_law(axis, points, x, other)
        fit = result["fits"][law]
        title = law
        if fit is not None:
            rows = chosen(points)
            axis.scatter(
                [p[x] for p in rows],
                [p["loss"] for p in rows],
                s=70,
                facecolors="none",
                edgecolors="black",
                label="fitted",
            )
            line = np.array([min(p[x] for p in points), max(p[x] for p in points)])
            x_c, alpha = (fit[name] for name in names)
            axis.plot(line, (x_c / line) ** alpha, "k--", linewidth=1)
            interval = fit["intervals"].get(names[1])
            about = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            title += f" = ({names[0]} / {law[2]})^{alpha:.3f}{about}"
        _name(axis, title, label, "loss, nats a token", points)
    _draw_fits(axes[3], result)
    save_figure(figure, path)


def _draw_law(axis: Any, points: Sequence[dict[str, Any]], x: str, other: str) -> None:
    """All points, a line through those that have as many of the other variable."""
    for value, color in zip(*_colors({p[other] for p in points}), strict=True):
        rows = sorted((p for p in points if p[other] == value), key=lambda p: p[x])
        name = f"{_short(value)} {other}"
        axis.plot(
            [p[x] for p in rows], [p["loss"] for p in rows], "o-", color=color, markersize=4, linewidth=1, label=name
        )


def _short(number: float) -> str:
    """Such as 950, 56k, 1.3M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.0f}"


def _colors(values: set[Any]) -> tuple[list[Any], Any]:
    from matplotlib import colormaps

    return sorted(values), colormaps["viridis"](np.linspace(0, 0.9, max(1, len(values))))


def _draw_fits(axis: Any, result: dict[str, Any]) -> None:
    """Measured losses by those that the laws of two variables give, and the predicted size."""
    points, laws = result["points"], {"chinchilla": chinchilla_loss, "kaplan": kaplan_loss}
    for (name, loss), marker in zip(laws.items(), "o^", strict=True):
        fit = result["fits"]["L(N,D)"][name]
        if fit is not None:
            numbers = {key: value for key, value in fit.items() if key not in ("intervals", "warnings")}
            x = loss([p["parameters"] for p in points], [p["tokens"] for p in points], **numbers)
            axis.plot(x, [p["loss"] for p in points], marker, markersize=5, alpha=0.8, label=f"{name}'s L(N, D)")
    prediction = result["prediction"]
    found, measured, interval = (prediction[name] for name in ("predicted", "measured", "interval"))
    if found and measured:
        errors = [[found - interval[0]], [interval[1] - found]] if interval else None
        about = f"predicted: {_short(prediction['parameters'])} parameters on {_short(prediction['tokens'])} tokens"
        axis.errorbar([found], [measured], xerr=errors, fmt="r*", markersize=13, capsize=4, label=about)
    ends = [min(p["loss"] for p in points), max(p["loss"] for p in points)] if points else [1, 2]
    ends[0] = min(ends[0], measured or ends[0], interval[0] if interval else ends[0])
    axis.plot(ends, ends, "k--", linewidth=1)
    _name(axis, "L(N, D): the laws, and the size that they predict", "loss by the law", "measured loss", points)


def _name(axis: Any, title: str, x: str, y: str, points: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axis.set(xscale="log", yscale="log", title=title, xlabel=x, ylabel=y)
    which = (axis.xaxis, axis.yaxis) if "loss" in x else (axis.yaxis,)
    for one in which:  # less than a factor of 10: decades would leave the axis without a number
        one.set_major_locator(MaxNLocator(6))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    if points:
        axis.legend(fontsize=8)
