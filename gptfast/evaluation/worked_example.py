"""Attention and byte pair encoding on examples small enough to follow by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import torch

from gptfast import ops
from gptfast.backend import cpu_isa

# Four tokens of four numbers; W_Q = W_K = W_V = I, one head.
TOKENS = ((1.0, 0.5, 0.3, 0.1), (0.2, 1.0, 0.7, 0.4), (0.60, 0.40, 0.52, 1.14), (0.460, 0.966, 0.035, 0.868))
WORDS = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
NOTES = (
    "The third and fourth tokens are not printed in the text that the example is from; these give its printed scores to 5e-4.",
    "The softmax of the fourth row is printed there as 0.19 0.23 0.26 0.29, which sums to 0.97; it is 0.1952 0.2372 0.2675 "
    "0.3001.",
)


def attention_example() -> dict[str, Any]:
    """softmax(mask(Q K^T / sqrt(4))) V step by step, by hand and by `gptfast.ops.causal_attention`.

    Returns:
        input, scores (Q K^T), scaled (/ 2), masked (None is minus infinity), weights, output: lists of rows; backends: the
        output of each backend that runs here; notes.
    """
    x = [list(row) for row in TOKENS]
    scores = [[sum(a * b for a, b in zip(q, k, strict=True)) for k in x] for q in x]
    scaled = [[score / math.sqrt(len(x[0])) for score in row] for row in scores]
    masked = [[score if key <= query else None for key, score in enumerate(row)] for query, row in enumerate(scaled)]
    weights = [_softmax(row) for row in masked]
    output = [[sum(w * row[d] for w, row in zip(ws, x, strict=True)) for d in range(len(x[0]))] for ws in weights]
    rows = torch.tensor(TOKENS)[None, None]
    backends = {name: ops.causal_attention(rows, rows, rows, backend=name)[0, 0].tolist() for name in _backends()}
    return {
        "input": x,
        "scores": scores,
        "scaled": scaled,
        "masked": masked,
        "weights": weights,
        "output": output,
        "backends": backends,
        "notes": list(NOTES),
    }


def _backends() -> list[str]:
    return ["eager"] + (["cpu"] if cpu_isa() else [])


def _softmax(row: list[float | None]) -> list[float]:
    exponentials = [0.0 if score is None else math.exp(score) for score in row]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]


def bpe_example(words: dict[str, int] = WORDS) -> dict[str, Any]:
    """Byte pair encoding learnt from word counts (Sennrich et al., arXiv 1508.07909), merge by merge.

    Args:
        words: how often each occurs.
    Returns:
        words; steps: for each merge pair, count, token (their join), vocabulary and corpus after it, a list of
        [pieces, count]. Of pairs that are as frequent the first one seen is merged. It ends when every word is one token.
    """
    corpus = [[list(word), count] for word, count in words.items()]
    vocabulary = sorted(set("".join(words)))
    steps = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in corpus:
            for pair in pairwise(pieces):
                pairs[pair] += count
        if not pairs:
            return {"words": dict(words), "steps": steps}
        pair = max(pairs, key=lambda pair: pairs[pair])
        corpus = [[_merged(pieces, pair), count] for pieces, count in corpus]
        vocabulary = [*vocabulary, "".join(pair)]
        step = {"pair": list(pair), "count": pairs[pair], "token": "".join(pair)}
        steps.append(step | {"vocabulary": vocabulary, "corpus": corpus})


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found
