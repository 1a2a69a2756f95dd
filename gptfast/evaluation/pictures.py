"""Pictures of the inside of a GPT, as PNG files. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptfast._files import as_drawn, save_figure

MOST_HEADS, MOST_LABELS = 16, 32  # shown in a picture of attention; tokens whose names fit on an axis


def visible(text: str) -> str:
    """A token's text for a picture: blanks can be seen, and a dollar sign begins no formula."""
    return as_drawn(text.replace(" ", "\u2423").replace("\n", "\\n").replace("\t", "\\t"))


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _name_axis(axis: Any, tokens: Sequence[str], which: str = "xy") -> None:
    if len(tokens) > MOST_LABELS:
        return
    if "x" in which:
        axis.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
    if "y" in which:
        axis.set_yticks(range(len(tokens)), tokens, fontsize=7)


def draw_attention(weights: np.ndarray, tokens: Sequence[str], layer: int, path: Path) -> None:
    """The heads of a layer: a row is what a token looks at. weights: (H, T, T)."""
    heads = weights[:MOST_HEADS]
    columns = min(4, len(heads))
    rows = -(-len(heads) // columns)
    figure = _figure(3.2 * columns, 3.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(heads) :]:
        axis.axis("off")
    for head, (axis, weight) in enumerate(zip(axes.flat, heads, strict=False)):
        axis.imshow(weight, cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"head {head}", fontsize=9)
        _name_axis(axis, tokens)
    more = "" if len(weights) <= MOST_HEADS else f", the first {MOST_HEADS} heads of {len(weights)}"
    figure.suptitle(f"attention, layer {layer}: rows look at columns{more}", fontsize=11)
    save_figure(figure, path)


def draw_mask(tokens: Sequence[str], window: int | None, path: Path) -> None:
    """Which tokens each token may look at, with a band of `window` where a layer has one."""
    T = len(tokens)
    rows, columns = np.indices((T, T))
    seen = (columns <= rows) & (columns > rows - (window or T))
    figure = _figure(5, 5)
    axis = figure.subplots()
    axis.imshow(seen, cmap="Greens", vmin=0, vmax=1.5)
    axis.set(title="causal mask: green may be looked at", xlabel="key", ylabel="query")
    _name_axis(axis, tokens)
    save_figure(figure, path)


def draw_lens(ids: Sequence[Sequence[str]], logprobs: np.ndarray, tokens: Sequence[str], path: Path) -> None:
    """The logit lens: what each position would predict after each layer. ids: (L + 1) lists of T texts."""
    last = max(0, len(tokens) - MOST_LABELS)  # the newest positions
    shown = np.exp(logprobs[:, last:])
    figure = _figure(max(5, 0.75 * shown.shape[1] + 1.5), max(3, 0.42 * len(shown) + 1.5))
    axis = figure.subplots()
    image = axis.imshow(shown, cmap="magma", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, row in enumerate(ids):
        for position, text in enumerate(row[last:]):
            color = "black" if shown[layer, position] > 0.6 else "white"
            axis.text(position, layer, text[:10], ha="center", va="center", fontsize=7, color=color)
    axis.set(title="logit lens: the likeliest next token after each layer", xlabel="after this token", ylabel="layer")
    axis.set_yticks(range(len(ids)), ["embedding", *map(str, range(1, len(ids)))], fontsize=8)
    axis.set_xticks(range(shown.shape[1]), tokens[last:], rotation=90, fontsize=7)
    figure.colorbar(image, ax=axis, label="probability")
    save_figure(figure, path)


def draw_distribution(tokens: Sequence[str], columns: Mapping[str, Sequence[float]], path: Path) -> None:
    """The probabilities of the likeliest next tokens, under several settings of sampling."""
    figure = _figure(8, 0.35 * len(tokens) + 1.8)
    axis = figure.subplots()
    height = 0.8 / len(columns)
    for n, (name, values) in enumerate(columns.items()):
        places = np.arange(len(tokens)) + (n - (len(columns) - 1) / 2) * height
        axis.barh(places, values, height=height, label=name)
    axis.set_yticks(range(len(tokens)), tokens, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="probability", title="the next token")
    axis.legend()
    save_figure(figure, path)


def draw_tree(
    names: Sequence[str], parents: Sequence[int], depths: Sequence[int], kept: Sequence[bool], path: Path
) -> None:
    """A beam search: a column a token, bold what was kept."""
    order: dict[int, list[int]] = {}
    for node, depth in enumerate(depths):
        order.setdefault(depth, []).append(node)
    tallest = max(len(nodes) for nodes in order.values())
    place = {-1: (0.0, tallest / 2)}
    for depth, nodes in order.items():
        for n, node in enumerate(nodes):
            place[node] = (float(depth), tallest * (n + 0.5) / len(nodes))
    figure = _figure(2.2 * (len(order) + 1), max(3, 0.4 * tallest))
    axis = figure.subplots()
    for node, parent in enumerate(parents):
        (x0, y0), (x1, y1) = place[parent], place[node]
        axis.plot([x0, x1], [y0, y1], color="#2a6f4e" if kept[node] else "#ccc", linewidth=1.6 if kept[node] else 0.8)
        weight = "bold" if kept[node] else "normal"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(x1, y1, names[node], ha="center", va="center", fontsize=8, weight=weight, bbox=box)
    axis.text(
        0, tallest / 2, "prompt", ha="center", va="center", fontsize=9, bbox={"facecolor": "white", "edgecolor": "#888"}
    )
    axis.set(xlim=(-0.4, len(order) + 0.5), ylim=(tallest, 0), title="beam search: log-probability of each path")
    axis.axis("off")
    save_figure(figure, path)


def draw_positions(table: np.ndarray, kind: str, path: Path) -> None:
    """Position encodings, (T, C)."""
    limit = float(np.abs(table).max()) or 1.0
    figure = _figure(8, 4.5)
    axis = figure.subplots()
    image = axis.imshow(table.T, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axis.set(title=f"position encodings ({kind})", xlabel="position", ylabel="dimension")
    figure.colorbar(image, ax=axis)
    save_figure(figure, path)


def draw_worked_example(example: dict[str, Any], path: Path) -> None:
    """The scaled scores and the weights of the worked example, with their numbers."""
    figure = _figure(9, 4)
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(
        axes, ("masked", "weights"), ("scores / 2, masked", "softmax of each row"), strict=True
    ):
        rows = [[np.nan if x is None else x for x in row] for row in example[name]]
        axis.imshow(rows, cmap="Blues", vmin=0, vmax=1.2)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                shown, color = "-inf" if np.isnan(value) else f"{value:.3f}", "white" if value > 0.7 else "black"
                axis.text(x, y, shown, ha="center", va="center", fontsize=9, color=color)
        axis.set(title=title, xlabel="key", ylabel="query", xticks=range(len(rows)), yticks=range(len(rows)))
    save_figure(figure, path)
