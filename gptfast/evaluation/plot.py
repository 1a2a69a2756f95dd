"""Pictures of evaluations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gptfast._files import as_drawn, save_figure


def plot_shots(
    results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str], chance: float | None = None
) -> None:
    """Draw accuracy by the number of shots, with intervals, as a PNG file.

    Args:
        results: what `evaluate_task` returns, by the name of the model.
        chance: accuracy of guessing; None: not drawn.
    Raises:
        ImportError: matplotlib is not installed.  OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    task = ""
    for name, result in results.items():
        task, curve = result["task"], result["curve"]
        shots, accuracy = [point["shots"] for point in curve], [point["accuracy"] for point in curve]
        below = [point["accuracy"] - point["interval"][0] for point in curve]
        above = [point["interval"][1] - point["accuracy"] for point in curve]
        axis.errorbar(shots, accuracy, yerr=[below, above], marker="o", markersize=4, capsize=3, label=as_drawn(name))
    if chance is not None:
        axis.axhline(chance, color="#888", linestyle="--", linewidth=1, label="guessing")
    axis.set(
        xlabel="solved items in the prompt", ylabel="accuracy (95% interval)", title=as_drawn(task), ylim=(-0.02, 1.02)
    )
    axis.set_xticks(sorted({point["shots"] for result in results.values() for point in result["curve"]}))
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)
