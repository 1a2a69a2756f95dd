"""How scaling laws are fitted: least squares of log L from several starts, draws for intervals, and what points do not support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from gptfast._checks import check_count

Points = tuple[np.ndarray, np.ndarray, np.ndarray]  # N, D, L
# of a law's parameters, N and D: log L, and its derivatives by the parameters
Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

HUBER = 1e-3  # of the difference of logarithms, as in Chinchilla's approach 3
PERCENTILES = (2.5, 97.5)
STEEPEST = 3.0  # largest exponent


def import_scipy() -> Any:
    """scipy.optimize. Raises ImportError that says how to install it."""
    try:
        return import_module("scipy.optimize")
    except ImportError as error:
        raise ImportError("scaling laws need scipy: pip install 'gptfast-kernels[evaluate]' (or scipy)") from error


class Law(NamedTuple):
    """A law in the parameters x that the fit moves. name: the published parameters of x. bounds: least and largest x."""

    predict: Predict
    name: Callable[[np.ndarray], dict[str, float]]
    starts: Sequence[np.ndarray]
    bounds: tuple[Sequence[float], Sequence[float]]


def chinchilla_law(points: Points) -> Law:
    """L = E + A / N^alpha + B / D^beta; x: log E, log A and log B at the middle of the points, alpha, beta."""
    n, d, loss = points
    middle_n, middle_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # there a start is a share of the loss

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
    return Law(predict, name, starts, ([-20, -20, -20, 0, 0], [least + 1, 20, 20, STEEPEST, STEEPEST]))


def kaplan_law(points: Points) -> Law:
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D; x: log N_c, alpha_N, log D_c, alpha_D."""
    n, d, loss = points
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
    return Law(predict, name, starts, ([-50, 1e-3, -50, 1e-3], [500, STEEPEST, 500, STEEPEST]))


def check_points(owner: str, columns: dict[str, Sequence[float]], least: int) -> list[np.ndarray]:
    """The columns as arrays, of which the last one is the losses.

    Raises:
        ValueError: not as many of each, too few, not all above 0, or all of one value other than the losses.
    """
    arrays = {name: np.asarray(column, dtype=float).reshape(-1) for name, column in columns.items()}
    sizes, (*first, last) = [len(column) for column in arrays.values()], arrays
    if len(set(sizes)) > 1 or sizes[0] < least:
        raise ValueError(
            f"{owner}: {' and '.join(map(str, sizes))} values of {', '.join(first)} and {last}; expected as many of each, and at "
            f"least {least}"
        )
    for name, column in arrays.items():
        if not ((column > 0) & np.isfinite(column)).all():
            raise ValueError(
                f"{owner}: {name} holds {column[~((column > 0) & np.isfinite(column))][0]}; expected numbers above 0"
            )
    for name in first:
        if len(set(arrays[name].tolist())) < 2:
            raise ValueError(
                f"{owner}: all points have {name} = {arrays[name][0]:g}; expected at least two values, or it tells nothing"
            )
    return list(arrays.values())


def summarise(law: Law, points: Points, bootstrap: int, seed: int) -> dict[str, Any]:
    """The parameters of the best fit by name, intervals of each, and warnings."""
    best, drawn = fit(law, points, bootstrap, seed)
    result: dict[str, Any] = {key: float(value) for key, value in law.name(best).items()}
    named = [law.name(x) for x in drawn]
    result["intervals"] = {key: _interval([one[key] for one in named]) for key in law.name(best) if drawn}
    result["warnings"] = [*_about_points(points, len(best)), *_at_bounds(law, best, result), *_wide(result)]
    return result


def predict_at(law: Law, points: Points, at: tuple[float, float], bootstrap: int, seed: int) -> dict[str, Any]:
    """predicted: the loss at (N, D). interval: 95% of predictions by fits to points drawn again, each with a residual of the
    best fit, which the parameters that were fitted made smaller."""
    best, drawn = fit(law, points, bootstrap, seed)
    n, d = np.array([at[0]], float), np.array([at[1]], float)
    count, freedom = len(points[0]), max(1, len(points[0]) - len(best))
    residuals = (np.log(points[2]) - law.predict(best, points[0], points[1])[0]) * np.sqrt(count / freedom)
    scatter = np.random.default_rng((seed, 1)).choice(residuals, len(drawn))
    losses = [float(np.exp(law.predict(x, n, d)[0][0] + more)) for x, more in zip(drawn, scatter, strict=True)]
    return {
        "predicted": float(np.exp(law.predict(best, n, d)[0][0])),
        "interval": _interval(losses) if losses else None,
    }


def fit(law: Law, points: Points, bootstrap: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """x of the best fit from several starts, and of fits to points drawn again."""
    least_squares = import_scipy().least_squares
    check_count("fit", "bootstrap", bootstrap, 0)
    low, high = (np.array(bound, float) for bound in law.bounds)

    def solve(start: np.ndarray, most: int, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> Any:
        inside = np.clip(start, low + 1e-9, high - 1e-9)

        def slopes(x: np.ndarray) -> Any:
            return law.predict(x, n, d)[1]

        logs, options = np.log(loss), {"loss": "huber", "f_scale": HUBER, "x_scale": "jac", "max_nfev": most}
        bounded: Any = {"jac": slopes, "bounds": (low, high), **options}
        return least_squares(lambda x: law.predict(x, n, d)[0] - logs, inside, **bounded)

    near = min((solve(start, 40, *points) for start in law.starts), key=lambda found: found.cost)
    best = solve(near.x, 400, *points)
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(bootstrap):
        chosen = rng.integers(len(points[0]), size=len(points[0]))
        if all(len(set(column[chosen].tolist())) > 1 for column in points[:2]):
            drawn.append(solve(best.x, 60, *(column[chosen] for column in points)).x)
    return best.x, drawn


def line(x: np.ndarray, y: np.ndarray, names: tuple[str, str], bootstrap: int, seed: int) -> dict[str, Any]:
    """A straight line y = alpha (log x_c - x) through logarithms: x_c and alpha by their names, intervals and warnings."""
    slope, height = np.polyfit(x, y, 1)
    freedom = len(x) - 2
    residuals = y - (height + slope * x)
    lines = []
    if freedom:
        rng = np.random.default_rng(seed)
        scatter = np.sqrt((residuals**2).sum() / rng.chisquare(freedom, (bootstrap, 1)))
        lines = [
            np.polyfit(x, row, 1) for row in height + slope * x + scatter * rng.standard_normal((bootstrap, len(x)))
        ]
    result: dict[str, Any] = dict(zip(names, _of_line(slope, height), strict=True))
    columns = np.array([_of_line(*one) for one in lines]).T
    result["intervals"] = {name: _interval(column) for name, column in zip(names, columns, strict=False)}
    found = [f"{len(x)} points: too few for an interval"] if not freedom else []
    if -slope <= 0:
        found.append(f"{names[1]} = {-slope:.3g}: the loss does not fall, which is no power law")
    result["warnings"] = [*found, *_wide(result)]
    return result


def _of_line(slope: float, height: float) -> tuple[float, float]:
    """x_c and alpha."""
    return float(np.exp(np.clip(-height / slope, -700, 700))) if slope else 0.0, float(-slope)


def _interval(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, PERCENTILES)]


def _about_points(points: Points, fitted: int) -> list[str]:
    """Warnings about the range and the number of the points."""
    found = []
    for name, column in zip(("parameters", "tokens"), points, strict=False):
        ratio = column.max() / column.min()
        if ratio < 10:
            found.append(
                f"{name} span a factor of {ratio:.1f}: an exponent from less than a factor of 10 says little beyond it"
            )
    if len(points[0]) < 2 * fitted:
        found.append(f"{len(points[0])} points for {fitted} fitted numbers: too few to see where the law is wrong")
    return found


def _at_bounds(law: Law, best: np.ndarray, result: dict[str, Any]) -> list[str]:
    """Warnings about parameters that the fit would move further than is allowed."""
    low, high = (np.array(bound, float) for bound in law.bounds)
    names = [name for name in result if name not in ("intervals", "warnings")]
    at = np.minimum(best - low, high - best) < 1e-3 * np.minimum(1, high - low)
    return [
        f"{name} = {result[name]:.3g} is at the bound of what is tried: the points do not determine it"
        for name, reached in zip(names, at, strict=True)
        if reached
    ]


def _wide(result: dict[str, Any]) -> list[str]:
    """Warnings about exponents whose interval is wider than they are large."""
    return [
        f"{name} = {result[name]:.3g} lies anywhere from {low:.3g} to {high:.3g}: the points do not determine it"
        for name, (low, high) in result["intervals"].items()
        if name.startswith(("alpha", "beta")) and high - low > result[name]
    ]
