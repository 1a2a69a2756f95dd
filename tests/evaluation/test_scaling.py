"""Scaling laws: published plans, fits of synthetic laws and the coverage of their intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gptfast.cli import main
from gptfast.evaluation.scaling import (
    CHINCHILLA,
    KAPLAN,
    chinchilla_loss,
    fit_chinchilla,
    fit_kaplan,
    kaplan_loss,
    plan,
)


def grid(sizes: int = 6, lengths: int = 6) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.logspace(6, 9.5, sizes), np.logspace(8, 11, lengths))
    return n.ravel(), d.ravel()


def test_published_plans():
    """Approach 3 of Hoffmann et al. at the compute of Gopher and Chinchilla."""
    found = plan(5.76e23)
    assert found["parameters"] == pytest.approx(32e9, rel=0.02) and found["tokens"] == pytest.approx(3.0e12, rel=0.02)
    for law in ("chinchilla", "kaplan"):
        for flops in (1e18, 1e21, 1e25):
            found = plan(flops, law)
            assert 6 * found["parameters"] * found["tokens"] == pytest.approx(flops)
            loss, constants = (chinchilla_loss, CHINCHILLA) if law == "chinchilla" else (kaplan_loss, KAPLAN)
            best = loss(found["parameters"], found["tokens"], **constants)
            for factor in (0.7, 0.98, 1.02, 1.5):  # the least loss of this budget
                other = found["parameters"] * factor
                assert loss(other, flops / 6 / other, **constants) > best


@pytest.mark.parametrize(
    ("fit", "loss", "constants"), [(fit_chinchilla, chinchilla_loss, CHINCHILLA), (fit_kaplan, kaplan_loss, KAPLAN)]
)
def test_a_law_without_noise_is_found(fit, loss, constants):
    n, d = grid()
    found = fit(n, d, loss(n, d, **constants), bootstrap=0)
    for name, value in constants.items():  # E, A, B within 1%, exponents within 0.1%
        assert found[name] == pytest.approx(value, rel=1e-3 if "a" in name[0] or "b" in name[0] else 2e-2), name
    assert found["intervals"] == {} and found["warnings"] == []


@pytest.mark.parametrize(
    ("fit", "loss", "constants", "names"),
    [
        (fit_chinchilla, chinchilla_loss, CHINCHILLA, ("E", "alpha", "beta")),
        (fit_kaplan, kaplan_loss, KAPLAN, ("alpha_N", "alpha_D")),
    ],
)
@pytest.mark.slow
def test_coverage_of_intervals(fit, loss, constants, names):
    """95% intervals hold the truth in most of 12 draws of noise; percentile intervals of few points are somewhat narrow."""
    n, d = grid()
    held = dict.fromkeys(names, 0)
    for seed in range(12):
        noise = np.exp(0.004 * np.random.default_rng(seed).standard_normal(len(n)))
        found = fit(n, d, loss(n, d, **constants) * noise, bootstrap=25, seed=seed)
        for name in names:
            low, high = found["intervals"][name]
            held[name] += low <= constants[name] <= high
            assert low <= found[name] * 1.05 and found[name] * 0.95 <= high
    assert all(count >= 9 for count in held.values()), held


def test_bootstrap_repeats():
    n, d = grid(3, 3)
    noisy = chinchilla_loss(n, d, **CHINCHILLA) * np.exp(0.01 * np.random.default_rng(1).standard_normal(9))
    assert fit_chinchilla(n, d, noisy, 8, seed=3) == fit_chinchilla(n, d, noisy, 8, seed=3)
    assert fit_chinchilla(n, d, noisy, 8, seed=3)["intervals"] != fit_chinchilla(n, d, noisy, 8, seed=4)["intervals"]


def test_what_the_points_do_not_support_is_said():
    n, d = np.array([1e6, 2e6, 1e6, 2e6, 3e6]), np.array([1e8, 1e8, 3e8, 3e8, 3e8])
    noisy = chinchilla_loss(n, d, **CHINCHILLA) * np.exp(0.01 * np.random.default_rng(1).standard_normal(5))
    found = fit_chinchilla(n, d, noisy, 5)
    assert (
        "parameters span a factor of 3.0" in found["warnings"][0]
        and "tokens span a factor of 3.0" in found["warnings"][1]
    )


@pytest.mark.parametrize("fit", [fit_chinchilla, fit_kaplan])
def test_errors(fit):
    with pytest.raises(ValueError, match=f"{fit.__name__}: 3 and 3 and 3 values of N, D and L"):
        fit([1, 2, 3], [1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match=f"{fit.__name__}: all points have D = 7"):
        fit([1, 2, 3, 4, 5], [7] * 5, [5, 4, 3, 2, 1])
    with pytest.raises(ValueError, match=f"{fit.__name__}: L holds nan; expected numbers above 0"):
        fit([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [5, 4, float("nan"), 2, 1])
    with pytest.raises(ValueError, match="plan: flops is -1"):
        plan(-1)
    with pytest.raises(ValueError, match="plan: law is 'hoffmann'"):
        plan(1e20, "hoffmann")


def command(capsys, monkeypatch, *arguments):
    """Standard output and error of gptfast scaling."""
    monkeypatch.setattr("sys.argv", ["gptfast", "scaling", *map(str, arguments)])
    with pytest.raises(SystemExit):
        main()
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found


def test_plan_command(capsys, monkeypatch):
    plan = ("--plan", "--flops")
    found = json.loads(command(capsys, monkeypatch, *plan, "5.76e23", "--json").out)
    assert set(found) == {"chinchilla", "kaplan"} and found["chinchilla"]["tokens"] == pytest.approx(3.0e12, rel=0.02)
    for law, row in found.items():
        assert set(row) == {"parameters", "tokens", "seconds", "bytes"}
        assert row["bytes"] == 16 * row["parameters"] and 1e9 < 5.76e23 / row["seconds"] < 1e16, law
    monkeypatch.setattr("gptfast.ladder.speed.flops_per_second", lambda: 1e11)  # measured once is enough
    assert "at 100 GFLOP/s of a training step: 66,666,666.67 days" in command(capsys, monkeypatch, *plan, "5.76e23").out
    for arguments, message in (
        ([*plan, "0"], "error: --flops is 0.0; expected a number above 0"),
        (["--plan"], "--plan goes with --flops"),
        ([*plan, "1e18", "--budget", "3m"], "--plan goes with --flops and nothing of a ladder"),
        (["--flops", "1e18"], "or --plan and --flops"),
        ([], "give --data and --budget to train a ladder"),
        (["--budget", "soon"], "--budget is 'soon'; expected a time above 0 with its unit"),
        (["--resume", "--out", "/nowhere/at/all"], "there is no folder /nowhere/at/all; leave --resume out"),
    ):
        assert message in command(capsys, monkeypatch, *arguments).err
