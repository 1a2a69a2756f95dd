"""How well a model predicts a token by how many tokens stand before it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from gptfast._checks import check_count
from gptfast._files import as_drawn, save_figure
from gptfast.data import Document
from gptfast.evaluation.perplexity import Settings, score_documents, summarise
from gptfast.tokenizer import Tokenizer

BINS = 32


def loss_by_position(
    model: Any,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    settings: Settings | None = None,
    *,
    bins: int = BINS,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The loss of tokens by their position in a window. Windows do not overlap, so a token at position n has n tokens before
    it. The loss of a model that uses distant tokens falls to the end of the window.

    Args:
        model, documents, tokenizer, progress: as in `score_documents`.
        settings: of `perplexity`; without a stride, which is the context here. None: its defaults.
        bins: into how many parts of equal width the positions are divided, at most one a position.
    Returns:
        What `perplexity` returns of the same windows; and positions: a list of dicts with first and last position (from 1: one
        token before), loss (mean, in nats a token), standard_error, perplexity, tokens. Parts without a token are left out.
    Raises:
        TypeError, ValueError: as `perplexity`; a stride that is not the context, or no bins.
    """
    check_count("loss_by_position", "bins", bins)
    settings = settings or Settings()
    context = settings.resolved(model).context or 0
    if settings.stride not in (None, context):
        raise ValueError(
            f"loss_by_position: stride is {settings.stride} and context {context}; windows do not overlap here - leave stride out"
        )
    settings = replace(settings, context=context, stride=context)
    sums, squares, counts = (np.zeros(context) for _ in range(3))

    def observe(first: int, logprobs: np.ndarray) -> None:
        places = slice(first, first + len(logprobs))
        sums[places] -= logprobs
        squares[places] += logprobs**2
        counts[places] += 1

    found = summarise(score_documents(model, documents, tokenizer, settings, progress, observe), settings)
    edges = np.unique(np.linspace(1, context, min(bins, context - 1) + 1).astype(int))
    parts = [slice(int(a), int(b)) for a, b in pairwise(edges)]
    rows = [_row(part, sums, squares, counts) for part in parts if counts[part].sum()]
    return {**found, "positions": rows}


def _row(part: slice, sums: np.ndarray, squares: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    n = counts[part].sum()
    loss = sums[part].sum() / n
    variance = max(0.0, squares[part].sum() / n - loss**2)
    return {
        **{"first": part.start, "last": part.stop - 1, "loss": float(loss)},
        "standard_error": float(math.sqrt(variance / (n - 1))) if n > 1 else None,
        **{"perplexity": float(np.exp(min(loss, 700.0))), "tokens": int(n)},
    }


def plot_positions(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw perplexity by position as a PNG file, a curve a model.

    Args:
        results: what `loss_by_position` returns, by the name of the model.
    Raises:
        ImportError: matplotlib is not installed.  OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, result in results.items():
        rows = result["positions"]
        middles = [(row["first"] + row["last"]) / 2 for row in rows]
        errors = [row["standard_error"] or 0.0 for row in rows]
        (line,) = axis.plot(
            middles, [row["perplexity"] for row in rows], marker="o", markersize=3, label=as_drawn(name)
        )
        low, high = (
            [np.exp(min(row["loss"] + s * e, 700.0)) for row, e in zip(rows, errors, strict=True)] for s in (-1, 1)
        )
        axis.fill_between(middles, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel="position in the window: tokens before the predicted one", ylabel="perplexity (± standard error)")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)
