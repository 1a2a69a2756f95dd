"""The ladder of `gptfast scaling`: its plan, points that survive a kill, fits, predictions, the command."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptfast
import gptfast.ladder.run as ladder_run
import gptfast.ladder.summary as ladder_summary
from gptfast.evaluation.scaling import chinchilla_loss, fit_power, predict_loss
from gptfast.ladder import Ladder, LadderOptions, Plan, Run, fit_all, make_plan
from gptfast.ladder.plan import GRIDS, SHAPES, TOKENS_A_PARAMETER, learning_rate
from gptfast.ladder.points import Points
from gptfast.ladder.speed import step_seconds
from gptfast.ladder.summary import of_compute, of_sizes, of_tokens
from gptfast.training.loop import Loop
from tests.evaluation.test_scaling import command

LAW = {"E": 1.2, "A": 30.0, "B": 300.0, "alpha": 0.33, "beta": 0.42}


def parameters(n_layer: int, n_embd: int) -> int:
    return 12 * n_layer * n_embd**2 + 90 * n_embd


def planned(budget: float, step: float = 1e-9, text: int = 10**9, overhead: float = 1.0) -> Plan:
    """On a machine where a step takes 1 ms and `step` seconds a parameter."""
    seconds = lambda n_layer, n_embd: 1e-3 + step * parameters(n_layer, n_embd)  # noqa: E731
    return make_plan(budget, 5.0, overhead, seconds, parameters, 1024, 10.0, text)


@pytest.mark.parametrize("budget", [30, 60, 180, 1500, 20000])
def test_a_plan_fits_its_budget(budget: float):
    plan = planned(budget, 3e-8)
    took = 5 + sum(run.seconds for run in plan.runs) + plan.predicted.seconds
    assert 0.6 * budget < took < budget  # the rest is for fits, and for a machine that is slower than measured
    sizes, lengths = {run.parameters for run in plan.runs}, {run.tokens for run in plan.runs}
    assert len(plan.runs) == len(sizes) * len(lengths) and len(sizes) >= 2 and len(lengths) >= 3
    assert max(lengths) / min(lengths) >= 10 and plan.predicted.parameters > max(sizes)
    assert plan.predicted.tokens == max(lengths) and min(run.steps for run in plan.runs) >= GRIDS[-1][-1]
    assert [run.seconds for run in plan.runs] == sorted(run.seconds for run in plan.runs)
    if budget >= 180:
        assert max(sizes) / min(sizes) >= 9
    if max(sizes) > parameters(*SHAPES[4]):
        assert max(lengths) >= TOKENS_A_PARAMETER * max(sizes)


def test_a_faster_machine_or_more_time_gives_larger_sizes():
    assert planned(1500, 1e-8).predicted.parameters > planned(180, 1e-8).predicted.parameters
    assert planned(180, 1e-9).predicted.parameters > planned(180, 1e-7).predicted.parameters
    assert max(run.tokens for run in planned(1500, 1e-9, text=10**6).runs) <= 4 * 10**6  # four times over the text


def test_a_budget_too_small_for_two_sizes_says_what_is_needed():
    with pytest.raises(ValueError, match=r"`budget` is 9s, too small for two sizes .* give at least (\d+)s") as error:
        planned(9)
    needed = int(str(error.value).split("at least ")[1].rstrip("s"))
    assert len(planned(needed).runs) == 6
    with pytest.raises(ValueError, match="too small for two sizes"):
        planned(0.7 * needed)


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="LadderOptions: device is 'tpu'; expected 'auto', 'cpu' or 'cuda'"):
        step_seconds(gptfast.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8), 1, device="tpu")


def test_budgets():
    for text, seconds in {"90s": 90, "25m": 1500, "1h30m": 5400, "2h": 7200, "0.5m": 30}.items():
        assert LadderOptions(budget=text).seconds == seconds
    for text in ("25", "", "0s", "m", "-3m", "3 minutes", "3m2h"):
        with pytest.raises(ValueError, match=r"`budget` is .*; expected a time above 0 with its unit"):
            LadderOptions(budget=text)
    with pytest.raises(ValueError, match="batch_size is 0"):
        LadderOptions(batch_size=0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Options of a ladder that takes a second, on a machine whose measured speed is made up."""

    def plan(budget: float, spent: float, overhead: float, seconds: Any, count: Any, step: int, *rest: Any) -> Plan:
        run = lambda n_embd, steps: Run(1, n_embd, count(1, n_embd), steps, steps * step, 0.1)  # noqa: E731
        return Plan(tuple(run(n_embd, steps) for n_embd in (8, 16) for steps in (4, 8, 40)), run(24, 40))

    monkeypatch.setattr(ladder_run, "make_plan", plan)
    monkeypatch.setattr(ladder_run, "EVALUATED", 256)
    monkeypatch.setattr(ladder_summary, "BOOTSTRAP", 10)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    options = {"data": str(tmp_path / "text.txt"), "out": tmp_path / "ladder", "block_size": 16}
    return options | {"budget": "10m", "batch_size": 2, "device": "cpu"}


def arguments(small: dict[str, Any]) -> list[str]:
    return [part for name, value in small.items() for part in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.slow
def test_command(small: dict[str, Any], capsys: Any, monkeypatch: Any):
    out = small["out"]
    found = json.loads(command(capsys, monkeypatch, *arguments(small), "--json").out)
    points = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
    assert points == found["points"] and len(points) == 6 and json.loads((out / "results.json").read_text()) == found
    for point in points:
        assert point["flops"] == 6 * point["parameters"] * point["tokens"] and 0 < point["loss"] < 5
        assert point["learning_rate"] == learning_rate(point["n_embd"])
    by_length = [point["loss"] for point in points if point["n_embd"] == 16]
    assert by_length == sorted(by_length, reverse=True)  # trained, each from the beginning
    assert {"L(N)", "L(D)", "L(C)", "L(N,D)"} == set(found["fits"]) and "channels" in found["learning_rate_rule"]
    assert found["fits"]["L(D)"]["alpha_D"] > 0 and set(found["fits"]["L(N,D)"]) == {"chinchilla", "kaplan"}
    prediction = found["prediction"]
    assert prediction["parameters"] > max(point["parameters"] for point in points)
    assert prediction["interval"][0] <= prediction["predicted"] <= prediction["interval"][1]
    assert 0 < prediction["measured"] < 5
    assert any("span a factor of" in text for text in found["warnings"])  # two sizes, of a factor of 3
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG") and not (out / "training").exists()
    again = command(capsys, monkeypatch, *arguments(small))
    assert "has a ladder already; continue it with --resume" in again.err
    page = command(capsys, monkeypatch, "--resume", "--out", out).out  # nothing is left to train
    assert "prediction" in page and "learning rate" in page and (out / "points.jsonl").read_text().count("\n") == 6
    for change, message in (
        (["--seed", "3"], "--seed is 3 but the ladder in"),
        (["--budget", "5m"], "--budget is 5m but the ladder in"),
        (["--data", "shakespeare"], "--data is shakespeare but the ladder in"),
    ):
        assert message in command(capsys, monkeypatch, "--resume", "--out", out, *change).err
    tokens = {path.name: path.read_bytes() for path in (out / "data").iterdir()}
    Path(small["data"]).write_text("Another text of another length. " * 90)
    assert "the data is not what the points" in command(capsys, monkeypatch, "--resume", "--out", out).err
    assert {path.name: path.read_bytes() for path in (out / "data").iterdir()} == tokens


@pytest.mark.slow
def test_a_ladder_goes_on_after_a_kill(small: dict[str, Any], monkeypatch: Any):
    """Killed in the third training, in the middle of a line: measured points stay, and the rest gives the same losses."""
    whole = Ladder({**small, "out": small["out"].parent / "whole"})
    whole.train()

    class Killed(Exception):
        pass

    ladder = Ladder(small)
    train, trained = ladder._train, []

    def die(run: Run) -> float:
        if len(trained) == 2:
            raise Killed
        trained.append(run)
        return train(run)

    ladder._train = die
    with pytest.raises(Killed):
        ladder.train()
    path = small["out"] / "points.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"parameters": 1480, "tokens": 12')
    resumed = Ladder({"out": small["out"], "resume": True})
    assert path.read_bytes() == kept and len(resumed.points.rows) == 2
    resumed.train()
    same = ("parameters", "tokens", "flops", "loss")
    assert [[row[name] for name in same] for row in resumed.points.rows] == [
        [row[name] for name in same] for row in whole.points.rows
    ]
    assert resumed.predicted.rows[0]["loss"] == whole.predicted.rows[0]["loss"]
    with pytest.raises(FileExistsError, match="has a ladder already"):
        Ladder(small)


def test_an_interrupted_training_is_no_point(small: dict[str, Any]):
    ladder = Ladder(small)
    train = ladder._train

    def interrupt(run: Run) -> None:
        train(run)
        ladder.interrupted = signal.SIGTERM

    ladder._train = interrupt
    ladder.train()
    assert ladder.interrupted == signal.SIGTERM and ladder.points.rows == [] and not ladder.predicted.rows
    assert not (small["out"] / "training").exists()


def test_a_signal_after_the_last_step_ends_the_ladder(small: dict[str, Any], monkeypatch: Any):
    """The training was whole, so it is a point; the next one does not begin."""
    ladder = Ladder(small)
    save = Loop._save

    def signalled(self: Loop) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self)

    monkeypatch.setattr(Loop, "_save", signalled)
    ladder.train()
    assert ladder.interrupted == signal.SIGTERM
    assert len(ladder.points.rows) == 1 and not ladder.predicted.rows


def test_scipy_is_asked_for_before_anything_is_trained(small: dict[str, Any], monkeypatch: Any, capsys: Any):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    found = command(capsys, monkeypatch, "--data", small["data"], "--budget", "1m", "--out", small["out"])
    assert "error: scaling laws need scipy: pip install 'gptfast-kernels[evaluate]' (or scipy)" in found.err
    assert not small["out"].exists()


def test_a_slow_machine_leaves_the_longest_trainings_out(small: dict[str, Any], monkeypatch: Any):
    """Trainings that take 30 times what was planned: the predicted size still has its time, and is trained on less."""
    clock = iter(range(0, 10**6, 3))
    ladder = Ladder({**small, "budget": "21s"})
    ladder.setup = 1.0
    monkeypatch.setattr(ladder_run.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(ladder, "_train", lambda run: 3.0 - 0.001 * run.steps)
    ladder.train()
    assert len(ladder.points.rows) == 5 and [run.steps for run in ladder.dropped] == [40]
    assert len(ladder.predicted.rows) == 1 and ladder.spent <= 21


def test_damaged_points(tmp_path: Path):
    path = tmp_path / "points.jsonl"
    points = Points(path)
    good = {"parameters": 5, "tokens": 7, "flops": 210.0, "loss": 2.5, "seconds": 1.0}
    points.add(good)
    points.add({**good, "tokens": 9})
    assert Points(path).rows == points.rows and Points(path).find(5, 9) == {**good, "tokens": 9}
    whole = path.read_text()
    for wrong in ("nonsense\n", '{"parameters": 5}\n', json.dumps({**good, "loss": -1}) + "\n", "\n", "[]\n"):
        path.write_text(wrong + whole)
        with pytest.raises(ValueError, match=r"points.jsonl: line 1 is no point, .*remove the line"):
            Points(path)


def ladder_points(seed: int, scatter: float = 0.004) -> list[dict[str, Any]]:
    """Losses of a law at five sizes and four lengths."""
    n, d = np.meshgrid([6e3, 14e3, 25e3, 56e3, 98e3], [2e5, 4.2e5, 9e5, 2e6])
    noise = np.exp(scatter * np.random.default_rng(seed).standard_normal(n.shape))
    rows = zip(n.ravel(), d.ravel(), (chinchilla_loss(n, d, **LAW) * noise).ravel(), strict=True)
    return [{"parameters": int(a), "tokens": int(b), "flops": 6 * a * b, "loss": float(c)} for a, b, c in rows]


def test_points_of_the_laws_of_one_variable():
    points = ladder_points(0)
    assert [point["parameters"] for point in of_sizes(points)] == [6000, 14000, 25000, 56000, 98000]
    assert {point["tokens"] for point in of_sizes(points)} == {2_000_000}
    assert {point["parameters"] for point in of_tokens(points)} == {98000} and len(of_tokens(points)) == 4
    front = of_compute(points)
    for point in points:  # nothing beats a point of the front
        beaten = [other for other in front if point["flops"] <= other["flops"] and point["loss"] < other["loss"]]
        assert not beaten
    assert {point["tokens"] for point in of_sizes(points[:-1])} == {
        900_000
    }  # one was not trained: of those that all have


def test_laws_of_one_variable_and_their_intervals():
    x = np.array([6e3, 14e3, 25e3, 56e3, 98e3])
    exact = fit_power(x, (3e8 / x) ** 0.1, ("N_c", "alpha_N"))
    assert exact["N_c"] == pytest.approx(3e8, rel=1e-6) and exact["alpha_N"] == pytest.approx(0.1)
    held = 0
    for seed in range(200):
        noise = np.exp(0.01 * np.random.default_rng(seed).standard_normal(5))
        low, high = fit_power(x, (3e8 / x) ** 0.1 * noise, ("N_c", "alpha_N"), 100, seed)["intervals"]["alpha_N"]
        held += low <= 0.1 <= high
    assert held >= 180  # of 190 that 95% are; 188 measured
    two = fit_power([1e4, 1e5], [3.0, 2.5], ("N_c", "alpha_N"))
    assert two["intervals"] == {} and two["warnings"] == ["2 points: too few for an interval"]
    assert "does not fall" in fit_power([1e4, 1e5, 1e6], [2.0, 2.1, 2.3], ("N_c", "alpha_N"))["warnings"][0]
    with pytest.raises(ValueError, match="fit_power: all points have x = 5"):
        fit_power([5, 5], [1, 2], ("N_c", "alpha_N"))


@pytest.mark.slow
def test_intervals_of_predictions_hold_what_is_measured():
    """At twice the largest size, with the scatter of the points."""
    held = 0
    for seed in range(12):
        points = ladder_points(seed)
        columns = [[point[name] for point in points] for name in ("parameters", "tokens", "loss")]
        found = predict_loss(*columns, 225e3, 2e6, bootstrap=25, seed=seed)
        scatter = np.exp(0.004 * np.random.default_rng(100 + seed).standard_normal())
        held += found["interval"][0] <= chinchilla_loss(225e3, 2e6, **LAW) * scatter <= found["interval"][1]
        assert found["interval"][1] - found["interval"][0] < 0.2
    assert held >= 10  # 12 measured


def test_few_points_are_said_and_no_error():
    for count in (0, 1, 3, 4):
        fits, warnings = fit_all(ladder_points(0)[:count], bootstrap=5)
        assert set(fits) == {"L(N)", "L(D)", "L(C)", "L(N,D)"} and fits["L(D)"] is None and warnings
        assert fits["L(N,D)"] == {"chinchilla": None, "kaplan": None}
    points = ladder_points(0)
    _, warnings = fit_all([points[n] for n in (0, 1, 5, 6, 11)], bootstrap=5)
    assert any("5 points for 5 fitted numbers" in text for text in warnings)
