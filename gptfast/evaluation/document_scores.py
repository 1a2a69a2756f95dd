"""Scores of documents: their sum, and paired differences between two models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptfast.evaluation.counts import Counts


@dataclass(slots=True)
class DocumentScore:
    """The scored tokens of a document.

    loss: their negative log-likelihood, in nats.
    tokens: their number.
    counts: bytes, characters and words of their text.
    """

    name: str
    loss: float = 0.0
    tokens: int = 0
    counts: Counts = field(default_factory=Counts)


def sum_of(scores: Iterable[DocumentScore]) -> DocumentScore:
    """The scores of documents as those of one."""
    total = DocumentScore("")
    for score in scores:
        total.loss += score.loss
        total.tokens += score.tokens
        total.counts += score.counts
    return total


def compare(first: Sequence[DocumentScore], other: Sequence[DocumentScore]) -> dict[str, Any]:
    """The paired difference of two models on the same documents.

    Returns:
        difference: mean over documents of other - first, in nats a token; standard_error: of that mean, with n - 1; None for
        one document. documents: those with a scored token.
    """
    pairs = [(a.loss / a.tokens, b.loss / b.tokens) for a, b in zip(first, other, strict=True) if a.tokens and b.tokens]
    differences = np.array([b - a for a, b in pairs])
    n = len(differences)
    return {
        "difference": float(differences.mean()),
        "standard_error": float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "documents": n,
    }
