"""benchmarks/bench_generate.py: order of turns, dropped rounds, the row of each program. Needs no peers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="needs the source tree")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


class Fake:
    """Answers with seconds from a list."""

    def __init__(self, name: str, *seconds: float) -> None:
        self.name, self.seconds, self.asked = name, list(seconds), []
        self.about = {"version": "1", "weights_mb": 3.0}

    def ask(self, *words):
        self.asked.append(words)
        return {"seconds": 0.5, "bytes": 100} if words == ("read",) else {"seconds": self.seconds.pop(0)}

    def cpu_seconds(self) -> float:
        return 10.0

    def peak_gb(self) -> float:
        return 1.5


def test_cpu_time_of_all_processes():
    """user, nice, system, irq, softirq and steal; not idle, iowait, nor guests, which user holds already."""
    from generate_rounds import TICKS, busy_seconds

    stat = "cpu  100 20 30 4000 500 6 7 8 90 10\ncpu0 50 10 15 2000 250 3 3 4 45 5\nintr 1 2 3\n"
    assert busy_seconds(stat) == (100 + 20 + 30 + 6 + 7 + 8) / TICKS


def test_cpu_time_of_a_process_with_brackets_in_its_name():
    from generate_rounds import TICKS, process_seconds

    fields = " ".join(str(n) for n in range(4, 53))
    assert process_seconds(f"77 (a ) 5 (b) c) S {fields}\n") == (14 + 15) / TICKS
    start, spent = process_seconds(Path("/proc/self/stat").read_text()), time.process_time()
    while time.process_time() - spent < 0.1:
        pass
    assert process_seconds(Path("/proc/self/stat").read_text()) - start == pytest.approx(0.1, abs=0.035)


def rounds_of(turns: dict[str, list[tuple[float, float]]], wanted: int, **options):
    """run_rounds over programs whose next turns are (rate, foreign share); and the order in which they came."""
    from generate_rounds import Turn, run_rounds

    order: list[str] = []

    def turn(worker):
        order.append(worker.name)
        return Turn(*turns[worker.name].pop(0))

    options = {"until": time.monotonic() + 60, "settle": lambda worker: None, **options}
    return run_rounds({name: Fake(name) for name in turns}, turn, wanted, **options), "".join(order)


def test_turns_rotate_and_ratios_are_of_one_round():
    """Memory twice as slow in the second round: the ratio stays."""
    found, order = rounds_of(
        {"a": [(200, 0.0), (100, 0.01), (230, 0)], "b": [(100, 0.06), (50, 0), (100, 0)], "c": [(1, 0)] * 3}, 3
    )
    assert order == "abcbcacab"
    assert (found.dropped, found.repeated) == (0, 0)
    assert found.ratios("a", "b") == [2.0, 2.0, 2.3]
    assert found.rates("b") == [100, 50, 100]


def test_a_disturbed_turn_is_made_again():
    found, order = rounds_of({"a": [(50, 0.061), (200, 0.02)], "b": [(100, 0)]}, 1)
    assert order == "aab" and found.ratios("a", "b") == [2.0]
    assert (found.dropped, found.repeated) == (0, 1)


def test_a_round_that_stays_disturbed_is_dropped():
    """The other's turn of that round does not count either."""
    found, order = rounds_of({"a": [(200, 0), (300, 0)], "b": [(1, 0.5)] * 3 + [(100, 0)]}, 1)
    assert order == "abbb" + "ba"
    assert found.ratios("a", "b") == [3.0]
    assert (found.dropped, found.repeated) == (1, 3)


def test_no_calm_round_at_all(capsys):
    from bench_generate import rows_of, show

    found, order = rounds_of({"a": [(1, 0.5)] * 99, "b": [(1, 0)] * 99}, 2)
    assert found.kept == [] and found.dropped == 6 and len(order) <= 6 * 4
    show("decode", found, "a", 1.0)
    assert "not measured: all 6 rounds were disturbed" in capsys.readouterr().out
    assert rows_of(found, "a", 1.0) == []


def test_a_looser_limit_and_the_end_of_the_time():
    found, _ = rounds_of({"a": [(1, 0.5)] * 9, "b": [(1, 0.9)] * 9}, 2, foreign=2.0)
    assert len(found.kept) == 2 and found.repeated == 0
    found, order = rounds_of({"a": [(1, 0)] * 9}, 3, until=time.monotonic() - 1)
    assert order == "a" and len(found.kept) == 1


def test_a_turn_counts_what_others_take(monkeypatch):
    """The worker's own CPU time does not count; 0.2 s of 0.5 s on two cores are a fifth."""
    import generate_rounds

    clock, busy, own = [0.0], [100.0], [5.0]

    class Working(Fake):
        def ask(self, *words):
            clock[0] += 0.25
            busy[0] += 0.4
            own[0] += 0.3
            return super().ask(*words)

        def cpu_seconds(self):
            return own[0]

    monkeypatch.setattr(generate_rounds.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(generate_rounds, "busy_now", lambda: busy[0])
    worker = Working("a", 0.25, 0.5, 9.0)
    turn = generate_rounds.take_turn(worker, ("decode", 1, 30), 30, False, 2)
    assert turn.foreign == pytest.approx(0.2)
    assert turn.rate == 30 / 0.375
    assert worker.asked == [("decode", 1, 30)] * 2, "again until 0.4 s are over"


def test_share_of_the_read_loop():
    """The loop runs before and after, in the same turn: 200 bytes/s; 30 steps/s of 5 bytes are 75% of it."""
    from generate_rounds import Rounds, take_turn

    worker = Fake("a", *[0.1] * 100_000)
    turn = take_turn(worker, ("decode", 1, 3), 3, True, 2)
    assert worker.asked[0] == worker.asked[-1] == ("read",) and turn.reading == 200
    rounds = Rounds(["a"], [{"a": turn}])
    assert rounds.shares("a", 5.0) == [pytest.approx(0.75)]


def test_table_and_rows(capsys):
    from bench_generate import rows_of, show
    from generate_rounds import Rounds, Turn

    kept = [{"gptfast q4": Turn(rate, 0.01, 100e9), "peer x": Turn(100, 0.02)} for rate in (200, 210, 300)]
    rounds = Rounds(["gptfast q4", "peer x"], kept, dropped=1, repeated=4)
    show("decode", rounds, "gptfast q4", 0.4e9)
    ours, peer = capsys.readouterr().out.splitlines()
    assert "210.0" in ours and "84 %" in ours and "3 rounds, 1 dropped, 4 turns repeated" in ours
    assert "2.10x   2.00 to 3.00" in peer
    ours, peer = json.loads(json.dumps(rows_of(rounds, "gptfast q4", 0.4e9)))
    assert ours["tokens_per_s"] == [200, 210, 300] and ours["share_of_reading"]["median"] == pytest.approx(0.84)
    assert peer["ours_is"] == {"median": 2.1, "min": 2.0, "max": 3.0} and peer["foreign_cpu"] == [0.02] * 3
    assert (peer["rounds"], peer["dropped"], peer["repeated"]) == (3, 1, 4)


def test_another_model_is_noticed():
    from bench_generate import disagreements

    right = [0.3, -1.6, -0.5, 0.4, 0.8]
    logits = {"a": [x + 0.01 for x in right], "b": [0.3, -1.6, -0.5, 0.4, 0.9], "c": [float("nan")] * 5, "d": right[:4]}
    assert disagreements(logits, right, 0.02) == ["b", "c", "d"]


WORKER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from worker import prompt, serve

class Runner:
    about = {"version": "7"}
    def __init__(self):
        print("loading")
        os.system("echo a program says something")
    def decode(self, rows, tokens):
        print("a library says something")
        return rows + tokens / 100
    def logits(self, tokens):
        return [float(x) for x in prompt(1, tokens)[:5]]
    def prefill(self, tokens):
        raise ValueError("no room for 99 tokens")

serve(Runner)
"""


@pytest.fixture
def worker():
    from generate_peers import HERE, Process

    process = Process("a worker", [sys.executable, "-c", WORKER, str(HERE)], 1)
    yield process
    process.close()


def test_worker_answers(worker):
    assert worker.about == {"version": "7"}
    assert worker.ask("decode", 2, 50) == {"seconds": 2.5}
    assert worker.ask("logits", 64) == {"logits": [1009.0, 1046.0, 1083.0, 1120.0, 1157.0]}
    assert 0 <= worker.cpu_seconds() < 5 and 0 < worker.peak_gb() < 1
    with pytest.raises(RuntimeError, match="a worker: unknown command about"):
        worker.ask("about")


def test_a_worker_that_ends_reports_why(worker):
    with pytest.raises(RuntimeError, match="a worker has ended: ValueError: no room for 99 tokens"):
        worker.ask("prefill", 99)


def test_peers_that_are_not_here_are_left_out(tmp_path, capsys):
    from bench_generate import start
    from generate_peers import Programs

    programs = Programs(tmp_path, 1, ik=tmp_path / "nothing")
    assert start(programs, "llama.cpp q8_0") is None
    assert start(programs, "ik q8_0 repack") is None
    assert start(programs, "OpenVINO int8 bf16") is None
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "llama.cpp q8_0 is left out: --llama-bin is not given"
    assert said[1] == f"ik q8_0 repack is left out: --ik-bin {tmp_path / 'nothing'} does not exist"
    assert said[2] == "OpenVINO int8 bf16 is left out: --openvino-python is not given"


@pytest.mark.slow
def test_ours_is_measured_as_it_is_described(tmp_path):
    """The worker of ours, on a small model: the logits are the model's, and decoding takes time."""
    import torch
    from generate_peers import Process, Programs

    import gptfast

    torch.manual_seed(0)
    model = gptfast.GPT(gptfast.GPTConfig(vocab_size=50257, block_size=64, n_layer=1, n_head=2, n_embd=32)).eval()
    programs = Programs(tmp_path, 1)
    model.save_pretrained(programs.model)
    process = Process("gptfast float32", programs.command("gptfast float32"), 1)
    try:
        ids = torch.tensor([[37 * i for i in range(20)]])
        with torch.no_grad():
            expected = model(ids)[0, -1, :5].tolist()
        assert process.ask("logits", 20)["logits"] == pytest.approx(expected, abs=1e-5)
        assert process.ask("decode", 2, 40)["seconds"] > 0
        assert process.ask("read")["bytes"] == pytest.approx(1e6 * process.about["weights_mb"])
    finally:
        process.close()


def test_which_programs_run_which_work(monkeypatch):
    """Beams only where there are some; a try with few tokens cuts every piece of work."""
    import bench_generate

    workers = {name: Fake(name, *[0.5] * 1000) for name in ("gptfast int8", "llama.cpp q8_0")}
    monkeypatch.setattr("generate_rounds.TURN", 0.0)
    options = argparse.Namespace(tokens=8, rounds=1, foreign=2.0)
    rows = bench_generate.compare(workers, "int8", "batch 8", options, time.monotonic() + 60)
    assert [row["name"] for row in rows] == list(workers)
    assert all(row["tokens_per_s"] == [128.0] and row["peak_gb"] == 1.5 for row in rows)
    assert set(workers["llama.cpp q8_0"].asked) == {("decode", 8, 8)}
    [row] = bench_generate.compare(workers, "int8", "beams", options, time.monotonic() + 60)
    assert row["name"] == "gptfast int8" and ("beams", 5, 8) in workers["gptfast int8"].asked
    bench_generate.compare(workers, "int8", "decode", options, time.monotonic() + 60)
    assert ("read",) in workers["gptfast int8"].asked and ("read",) not in workers["llama.cpp q8_0"].asked
