"""The laws fitted to the points of a ladder, the loss that they predict, and what they do not support."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gptfast.evaluation.scaling import fit_chinchilla, fit_kaplan, fit_power, predict_loss
from gptfast.ladder.plan import LEARNING_RATE_RULE
from gptfast.ladder.run import Ladder

Point = dict[str, Any]
BOOTSTRAP = 200  # draws for the intervals


def of_sizes(points: Sequence[Point]) -> list[Point]:
    """Each size at one number of tokens, the largest that most of them have: L(N)."""
    return _most(points, "tokens")


def of_tokens(points: Sequence[Point]) -> list[Point]:
    """One size at each number of tokens, the largest that most of these have: L(D)."""
    return _most(points, "parameters")


def _most(points: Sequence[Point], same: str) -> list[Point]:
    counts = Counter(point[same] for point in points)
    chosen = max(counts, key=lambda value: (counts[value], value))
    return [point for point in points if point[same] == chosen]


def of_compute(points: Sequence[Point]) -> list[Point]:
    """Trainings that none with as little compute beats: L(C)."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point["flops"], point["loss"])):
        if not found or point["loss"] < found[-1]["loss"]:
            found.append(point)
    return found


def fit_all(points: Sequence[Point], seed: int = 0, bootstrap: int = BOOTSTRAP) -> tuple[dict[str, Any], list[str]]:
    """The fits by the names of the laws, None where there are too few points; and warnings."""
    fits: dict[str, Any] = {}
    warnings: list[str] = []

    def keep(name: str, fit: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            found = fit()
        except ValueError as error:
            warnings.append(f"{name}: {error}")
            return None
        warnings.extend(f"{name}: {text}" for text in found["warnings"])
        return found

    for name, chosen, x, names in (
        ("L(N)", of_sizes, "parameters", ("N_c", "alpha_N")),
        ("L(D)", of_tokens, "tokens", ("D_c", "alpha_D")),
        ("L(C)", of_compute, "flops", ("C_c", "alpha_C")),
    ):
        rows = chosen(points) if points else []
        places, losses = _columns(rows, x, "loss")
        fits[name] = keep(name, partial(fit_power, places, losses, names, bootstrap, seed))
        if fits[name] is not None:
            fits[name]["points"] = len(rows)
    n, d, losses = _columns(points, "parameters", "tokens", "loss")
    fits["L(N,D)"] = {
        law: keep(f"L(N,D), {law}", partial(fit, n, d, losses, bootstrap, seed))
        for law, fit in (("chinchilla", fit_chinchilla), ("kaplan", fit_kaplan))
    }
    return fits, list(dict.fromkeys(warnings))


def _columns(points: Sequence[Point], *names: str) -> Any:
    return [[point[name] for point in points] for name in names]


def predict(ladder: Ladder) -> dict[str, Any]:
    """The loss of the size that the ladder does not have, from its points alone, and the measured one where there is one."""
    run = ladder.to_predict()
    n, d, losses = _columns(ladder.points.rows, "parameters", "tokens", "loss")
    try:
        found = predict_loss(n, d, losses, run.parameters, run.tokens, BOOTSTRAP, ladder.options.seed)
    except ValueError:  # too few points, which `fit_all` says
        found = {"law": None, "predicted": None, "interval": None}
    measured = ladder.predicted.rows[0]["loss"] if ladder.predicted.rows else None
    return {"parameters": run.parameters, "tokens": run.tokens, **found, "measured": measured}


def summarise(ladder: Ladder) -> dict[str, Any]:
    """The result of a ladder, as `gptfast scaling --json` prints it."""
    fits, warnings = fit_all(ladder.points.rows, ladder.options.seed, BOOTSTRAP)
    prediction = predict(ladder)
    return {
        "data": ladder.chosen["data"],
        "tokenizer": ladder.data.tokenizer.kind,
        "budget": ladder.options.seconds,
        "seconds": ladder.spent,
        "tokens_a_step": ladder.options.batch_size * ladder.options.block_size,
        "learning_rate_rule": LEARNING_RATE_RULE,
        "parameters_counted": "all but the position table; flops = 6 x parameters x tokens",
        "points": ladder.points.rows,
        "fits": fits,
        "prediction": prediction,
        "warnings": [*_about_trainings(ladder), *warnings, *_about_prediction(ladder, prediction)],
    }


def _about_trainings(ladder: Ladder) -> list[str]:
    found, text = [], len(ladder.data.train)
    longest = max(run.tokens for run in ladder.plan.runs)
    if longest > text:
        found.append(
            f"the longest trainings read the text {longest / text:.1f} times: repeated tokens count as new ones in D"
        )
    if ladder.dropped:
        found.append(
            f"{len(ladder.dropped)} of {len(ladder.plan.runs)} trainings were left out, as the budget was spent: the machine was slower than measured"
        )
    return found


def _about_prediction(ladder: Ladder, prediction: dict[str, Any]) -> list[str]:
    interval, measured, found = prediction["interval"], prediction["measured"], []
    largest = max((row["parameters"] for row in ladder.points.rows), default=0)
    if largest:
        found.append(
            f"prediction: {prediction['parameters'] / largest:.1f} times the largest size that was fitted; the interval holds if the law does there"
        )
    if interval and measured and not interval[0] <= measured <= interval[1]:
        found.append(
            f"prediction: the measured loss {measured:.4f} is outside the interval {interval[0]:.4f} to {interval[1]:.4f}: the law "
            "does not hold as far as that, or the points scatter more than their fit"
        )
    return found
