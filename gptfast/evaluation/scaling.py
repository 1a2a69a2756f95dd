"""Scaling laws: fits of the loss by parameters and tokens, and compute-optimal plans by published constants.

N parameters, D training tokens, L loss in nats a token, C = 6 N D FLOPs.

Chinchilla   L(N, D) = E + A / N^alpha + B / D^beta                                (Hoffmann et al., arXiv 2203.15556, approach 3)
Kaplan       L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D            (Kaplan et al., arXiv 2001.08361, equation 1.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptfast._checks import check_choice, check_count, check_real

# Hoffmann et al. 2022, approach 3.
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
# Kaplan et al. 2020: the fits of one variable, equations 1.1 and 1.2. N counts no embeddings there.
KAPLAN = {"alpha_N": 0.076, "N_c": 8.8e13, "alpha_D": 0.095, "D_c": 5.4e13}
LAWS = ("chinchilla", "kaplan")
HUBER = 1e-3  # of the difference of logarithms, as in approach 3

# of the law's parameters, N and D: log L, and its derivatives by the parameters
Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


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


def speed(device: str = "cpu") -> float:
    """FLOPs a second of a training step on this machine, measured on a small GPT in the dtype that training would choose."""
    import time

    import torch

    from gptfast.machine import choose_dtype
    from gptfast.models import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=4096, dropout=0.0)).to(device)
    ids = torch.randint(4096, (8, 256), device=device)
    dtype = getattr(torch, choose_dtype(device)[0])
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            model(ids, ids)[1].backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    return model.flops_per_token(256) * ids.numel() / min(seconds)


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
    n, d, loss = _points("fit_chinchilla", N, D, L, 5)
    # A and B at the middle of the points, so that a start is a share of the loss
    middle_n, middle_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())

    def predict(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e, a, b, alpha, beta = x
        log_n, log_d = np.log(n / middle_n), np.log(d / middle_d)
        terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
        loss = np.logaddexp.reduce(terms)
        w = np.exp(terms - loss)
        return loss, np.stack([*w, -w[1] * log_n, -w[2] * log_d], axis=1)

    def name(x: np.ndarray) -> dict[str, float]:
        e, a, b, alpha, beta = x
        scales = {"A": a + alpha * np.log(middle_n), "B": b + beta * np.log(middle_d)}
        return {
            "E": np.exp(e),
            **{key: np.exp(min(value, 700)) for key, value in scales.items()},
            "alpha": alpha,
            "beta": beta,
        }

    least = np.log(loss.min())
    rest = np.log(max(loss.mean() - loss.min() / 2, 1e-3) / 2)
    starts = [
        np.array([least + np.log(share), rest, rest, alpha, beta])
        for share in (0.5, 0.9)
        for alpha in (0.2, 0.5, 1.0)
        for beta in (0.2, 0.5, 1.0)
    ]
    bounds = ([-20, -20, -20, 0, 0], [least + 1, 20, 20, 3, 3])
    return _fit(predict, name, starts, bounds, (n, d, loss), bootstrap, seed)


def fit_kaplan(
    N: Sequence[float], D: Sequence[float], L: Sequence[float], bootstrap: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Fit L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D to measured losses.

    Arguments and errors as `fit_chinchilla`, with at least four points.

    Returns:
        N_c, alpha_N, D_c, alpha_D; intervals and warnings as there.
    """
    n, d, loss = _points("fit_kaplan", N, D, L, 4)
    log_n, log_d = np.log(n), np.log(d)

    def predict(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_nc, alpha_n, log_dc, alpha_d = x
        by_n, by_d = log_nc - np.log(n), log_dc - np.log(d)
        total = np.logaddexp(alpha_n / alpha_d * by_n, by_d)
        w = np.exp(alpha_n / alpha_d * by_n - total)
        slopes = [alpha_n * w, w * by_n, alpha_d * (1 - w), total - w * alpha_n / alpha_d * by_n]
        return alpha_d * total, np.stack(slopes, axis=1)

    def name(x: np.ndarray) -> dict[str, float]:
        return {"N_c": np.exp(min(x[0], 700)), "alpha_N": x[1], "D_c": np.exp(min(x[2], 700)), "alpha_D": x[3]}

    middle = np.log(loss).mean()
    starts = [
        np.array([log_n.mean() + middle / alpha_n, alpha_n, log_d.mean() + middle / alpha_d, alpha_d])
        for alpha_n in (0.05, 0.1, 0.3)
        for alpha_d in (0.05, 0.1, 0.3)
    ]
    bounds = ([-50, 1e-3, -50, 1e-3], [500, 3, 500, 3])
    return _fit(predict, name, starts, bounds, (n, d, loss), bootstrap, seed)


def _points(owner: str, N: Any, D: Any, L: Any, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = [np.asarray(column, dtype=float).reshape(-1) for column in (N, D, L)]
    if len({len(column) for column in columns}) > 1 or len(columns[0]) < least:
        raise ValueError(
            f"{owner}: {' and '.join(str(len(c)) for c in columns)} values of N, D and L; expected as many of each, and at least "
            f"{least}"
        )
    for name, column in zip(("N", "D", "L"), columns, strict=True):
        if not ((column > 0) & np.isfinite(column)).all():
            raise ValueError(
                f"{owner}: {name} holds {column[~((column > 0) & np.isfinite(column))][0]}; expected numbers above 0"
            )
    for name, column in zip(("N", "D"), columns, strict=False):
        if len(set(column.tolist())) < 2:
            raise ValueError(
                f"{owner}: all points have {name} = {column[0]:g}; expected at least two values, or it tells nothing"
            )
    return columns[0], columns[1], columns[2]


def _fit(
    predict: Predict,
    name: Callable[[np.ndarray], dict[str, float]],
    starts: Sequence[np.ndarray],
    bounds: tuple[Sequence[float], Sequence[float]],
    points: tuple[np.ndarray, np.ndarray, np.ndarray],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """The best fit from several starts, and percentiles of fits to points drawn again."""
    from scipy.optimize import least_squares

    check_count("fit", "bootstrap", bootstrap, 0)
    low, high = (np.array(bound, float) for bound in bounds)

    def solve(start: np.ndarray, most: int, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> Any:
        inside = np.clip(start, low + 1e-9, high - 1e-9)

        def slopes(x: np.ndarray) -> Any:
            return predict(x, n, d)[1]

        logs, options = np.log(loss), {"loss": "huber", "f_scale": HUBER, "x_scale": "jac", "max_nfev": most}
        bounded: Any = {"jac": slopes, "bounds": (low, high), **options}
        return least_squares(lambda x: predict(x, n, d)[0] - logs, inside, **bounded)

    near = min((solve(start, 40, *points) for start in starts), key=lambda found: found.cost)
    best = solve(near.x, 400, *points)
    result: dict[str, Any] = {key: float(value) for key, value in name(best.x).items()}
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(bootstrap):
        chosen = rng.integers(len(points[0]), size=len(points[0]))
        if any(len(set(column[chosen].tolist())) < 2 for column in points[:2]):
            continue
        drawn.append(name(solve(best.x, 60, *(column[chosen] for column in points)).x))
    result["intervals"] = {
        key: [float(x) for x in np.percentile([one[key] for one in drawn], [2.5, 97.5])]
        for key in name(best.x)
        if drawn
    }
    result["warnings"] = _warnings(result, points)
    return result


def _warnings(fit: dict[str, Any], points: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[str]:
    """What the points do not support."""
    found = []
    for name, column in zip(("parameters", "tokens"), points, strict=False):
        ratio = column.max() / column.min()
        if ratio < 10:
            found.append(
                f"{name} span a factor of {ratio:.1f}: an exponent from less than a factor of 10 says little beyond it"
            )
    for name, (low, high) in fit["intervals"].items():
        if name.startswith(("alpha", "beta")) and high - low > fit[name]:
            found.append(
                f"{name} = {fit[name]:.3g} lies anywhere from {low:.3g} to {high:.3g}: the points do not determine it"
            )
    return found
