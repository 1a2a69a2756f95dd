"""What the distribution of drawn tokens is compared with."""

from __future__ import annotations

import math

import torch

from gptfast.generation import GenerationConfig
from gptfast.generation.sampling import warp


def without_padding(new, eos):
    ends = [new.index(token) + 1 for token in (eos if isinstance(eos, list) else [eos]) if token in new]
    return new[: min(ends)] if ends else new


def chi_square(counts, probs, draws):
    """Pearson's statistic over the tokens that are expected five times or more, and its degrees of freedom."""
    expected = probs * draws
    usual = expected >= 5
    rest = torch.tensor([counts[~usual].sum(), expected[~usual].sum()])
    statistic = ((counts - expected)[usual] ** 2 / expected[usual]).sum()
    if rest[1] >= 5:
        statistic = statistic + (rest[0] - rest[1]) ** 2 / rest[1]
    return statistic.item(), int(usual.sum()) - (0 if rest[1] >= 5 else 1)


def assert_distributed(tokens, probs):
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    statistic, degrees = chi_square(counts, probs.double(), len(tokens))
    # Wilson-Hilferty: the cube root of a chi-square over its degrees of freedom is all but normal
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    assert abs(z) < 4.5, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"


def next_probs(model, row, **options):
    with torch.no_grad():
        logits = model(torch.tensor([row]))[:, -1] / 4  # flatter, so that more than one token is likely
    return warp(logits, GenerationConfig(**options)).softmax(-1)[0]
