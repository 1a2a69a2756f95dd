"""Scaling laws: fits of the loss by parameters and tokens, and compute-optimal plans by published constants.

N parameters, D training tokens, L loss in nats a token, C = 6 N D FLOPs.

Chinchilla   L(N, D) = E + A / N^alpha + B / D^beta                                (Hoffmann et al., arXiv 2203.15556, approach 3)
Kaplan       L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D            (Kaplan et al., arXiv 2001.08361, equation 1.5)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptfast._checks import check_choice, check_count, check_real
from gptfast.evaluation.fitting import (
    Points,
    check_points,
    chinchilla_law,
    kaplan_law,
    line,
    predict_at,
    summarise,
)

# Hoffmann et al. 2022, approach 3.
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
# Kaplan et al. 2020: the fits of one variable, equations 1.1 and 1.2. N counts no embeddings there.
KAPLAN = {"alpha_N": 0.076, "N_c": 8.8e13, "alpha_D": 0.095, "D_c": 5.4e13}
LAWS = ("chinchilla", "kaplan")


def plan(flops: float, law: str = "chinchilla") -> dict[str, float]:
    """The parameters and tokens that give the least loss for a budget of compute.

    Chinchilla's approach 3 at 5.76e23 FLOPs gives 32 billion parameters and 3.0 trillion tokens, not the 20 tokens a parameter
    of its approaches 1 and 2. Kaplan's plan is the minimum of equation 1.5 with the fits of one variable.

    Args:
        flops: of the whole training, C = 6 N D.
        law: "chinchilla" or "kaplan".
    Returns:
        parameters, tokens.
    Raises:
        TypeError, ValueError: not a positive number, an unknown law.
    """
    check_real("plan", "flops", flops, "a number above 0", lambda x: 0 < x < math.inf)
    check_choice("plan", "law", law, LAWS)
    if law == "chinchilla":
        c = CHINCHILLA
        scale = (c["alpha"] * c["A"] / (c["beta"] * c["B"])) ** (1 / (c["alpha"] + c["beta"]))
        parameters = scale * (flops / 6) ** (c["beta"] / (c["alpha"] + c["beta"]))
    else:
        k = KAPLAN["alpha_N"] / KAPLAN["alpha_D"]
        parameters = (k * KAPLAN["N_c"] ** k * flops / (6 * KAPLAN["D_c"])) ** (1 / (k + 1))
    return {"parameters": parameters, "tokens": flops / 6 / parameters}


BYTES = 16  # a parameter in training: fp32 weight, gradient and two moments of AdamW


def chinchilla_loss(N: Any, D: Any, E: float, A: float, B: float, alpha: float, beta: float) -> Any:
    """L(N, D) of Hoffmann et al."""
    return E + A / np.asarray(N, float) ** alpha + B / np.asarray(D, float) ** beta


def kaplan_loss(N: Any, D: Any, N_c: float, alpha_N: float, D_c: float, alpha_D: float) -> Any:
    """L(N, D) of Kaplan et al."""
    return ((N_c / np.asarray(N, float)) ** (alpha_N / alpha_D) + D_c / np.asarray(D, float)) ** alpha_D


def fit_chinchilla(
    N: Sequence[float], D: Sequence[float], L: Sequence[float], bootstrap: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Fit L = E + A / N^alpha + B / D^beta to measured losses, by the Huber loss of log L as approach 3 does.

    Args:
        N, D, L: parameters, tokens and loss of each point; at least five points, not all of one N or one D.
        bootstrap: how often the points are drawn again, with replacement, for the intervals; 0: no intervals.
        seed: of these draws.
    Returns:
        E, A, B, alpha, beta; intervals: [low, high] of each, 95%; warnings: what the points do not support.
    Raises:
        ImportError: scipy is not installed.  TypeError, ValueError: too few points, or numbers that are not above 0.
    """
    points = _points("fit_chinchilla", N, D, L, 5)
    return summarise(chinchilla_law(points), points, bootstrap, seed)


def fit_kaplan(
    N: Sequence[float], D: Sequence[float], L: Sequence[float], bootstrap: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Fit L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D to measured losses.

    Arguments and errors as `fit_chinchilla`, with at least four points.

    Returns:
        N_c, alpha_N, D_c, alpha_D; intervals and warnings as there.
    """
    points = _points("fit_kaplan", N, D, L, 4)
    return summarise(kaplan_law(points), points, bootstrap, seed)


def predict_loss(
    N: Sequence[float],
    D: Sequence[float],
    L: Sequence[float],
    parameters: float,
    tokens: float,
    bootstrap: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """The loss of another size, by Chinchilla's law fitted to points, or Kaplan's where there are only four.

    Args:
        N, D, L, bootstrap, seed: as in `fit_chinchilla`.
        parameters, tokens: of the model to predict.
    Returns:
        law: "chinchilla" or "kaplan"; predicted; interval, [low, high], 95%: where its measured loss lies if the law holds there.
        It has the uncertainty of the fit and the scatter of the points. None without draws.
    """
    law, least = ("kaplan", 4) if np.size(L) == 4 else ("chinchilla", 5)
    points = _points("predict_loss", N, D, L, least)
    made = kaplan_law(points) if law == "kaplan" else chinchilla_law(points)
    return {"law": law, **predict_at(made, points, (parameters, tokens), bootstrap, seed)}


def fit_power(
    x: Sequence[float], L: Sequence[float], names: tuple[str, str], bootstrap: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Fit L = (x_c / x)^alpha to measured losses: a straight line of log L by log x (Kaplan et al., equations 1.1 to 1.3).

    Args:
        x, L: parameters, tokens or FLOPs of each point, and its loss; at least two points, not all of one x.
        names: of x_c and alpha in the result, such as ("N_c", "alpha_N").
        bootstrap: draws for the intervals, each of a scatter that the residuals allow (its square is their sum over a
            chi-squared number) and of points with that scatter around the line.
        seed: of these draws.
    Returns:
        x_c and alpha by their names; intervals, empty for two points, which leave no residual; warnings.
    """
    places, losses = (np.log(column) for column in check_points("fit_power", {"x": x, "L": L}, 2))
    check_count("fit_power", "bootstrap", bootstrap, 0)
    return line(places, losses, names, bootstrap, seed)


def _points(owner: str, N: Sequence[float], D: Sequence[float], L: Sequence[float], least: int) -> Points:
    n, d, loss = check_points(owner, {"N": N, "D": D, "L": L}, least)
    return n, d, loss
