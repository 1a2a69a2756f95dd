"""`gptfast watch`: a run while it trains, after its end, killed, half written; and what is no run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gptfast._locks import FileLock
from gptfast._plots import braille_plot, sparkline
from gptfast.cli._watch_viewer import Viewer, Viewing
from gptfast.training.watching import watch_run
from tests.support.train_command import gptfast, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A finished run of 12 steps that no test changes."""
    out = tmp_path_factory.mktemp("watched") / "run"
    assert run(text, out) == 0
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert gptfast("watch", *arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert gptfast("watch", *arguments) == 1
    return capsys.readouterr().err


def test_a_finished_run(trained, capsys):
    """The figures are those of the log's last records."""
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    best = min((r["val_loss"], r["step"]) for r in records if "val_loss" in r)
    page = shown(capsys, trained, "--once")
    assert "complete: all 12 steps are made" in page and "step 12 of 12 (100%)" in page
    assert f"loss {records[-1]['loss']:.4f}" in page and f"val {records[-1]['val_loss']:.4f}" in page
    assert f"(best {best[0]:.4f} at step {best[1]})" in page
    assert (
        f"learning rate {records[-1]['lr']:.3g}" in page and f"{records[-1]['tokens_per_second']:,.0f} tokens/s" in page
    )
    assert "ETA" not in page and "sample of step 12\n" in page
    assert any("\u2800" < sign <= "\u28ff" for sign in page)


def test_json(trained, capsys):
    found = json.loads(shown(capsys, trained, "--json", "--no-samples"))
    assert found["state"] == "complete" and found["step"] == found["planned_steps"] == found["checkpoint_step"] == 12
    assert found["alarms"] == [] and found["sample"] is None and found["seconds_left"] is None
    sample = json.loads(shown(capsys, trained, "--json", "--prompt", "Is", "--tokens", "4"))["sample"]
    assert sample["step"] == 12 and sample["prompt"] == "Is" and len(sample["text"]) == 4
    assert "expected 1 to 15" in json.loads(shown(capsys, trained, "--json", "--prompt", "I" * 16))["sample"]["note"]


def test_a_run_in_progress(out, capsys):
    """The lock tells that it runs; the log is further than the checkpoint, and its last line is half written."""
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 16, "loss": 1.5, "lr": 0.001, "seconds": 1000.0, "planned_steps": 20}\n{"step": 17, "lo')
    lock = FileLock(out / "training.lock")
    assert lock.acquire() is None
    try:
        before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
        page = shown(capsys, out, "--once")
        seen = watch_run(out)
        assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before
    finally:
        lock.release()
    assert f"running (process {os.getpid()}" in page and "step 16 of 20 (80%)" in page and "ETA" in page
    assert seen.seconds_a_step is not None and seen.seconds_left == pytest.approx(4 * seen.seconds_a_step)
    assert watch_run(out).state == "stopped"
    assert "continue from step 12, 4 steps before the end of the log with --resume" in shown(capsys, out)


def test_a_killed_run(out, capsys):
    """Its lock is left behind, with the number of a process that has ended."""
    code = "import os, sys; from pathlib import Path; from gptfast._locks import FileLock\nlock = FileLock(Path(sys.argv[1]))\nlock.acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, out / "training.lock"], check=False)
    page = shown(capsys, out)
    assert "killed: process " in page and "no longer exists; continue from step 12 with --resume" in page


def test_a_run_that_begins(tmp_path, capsys):
    lock = FileLock(tmp_path / "training.lock")
    assert lock.acquire() is None
    try:
        assert "starting (process" in shown(capsys, tmp_path)
    finally:
        lock.release()
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "ended before its first checkpoint" in shown(capsys, tmp_path)


def test_alarms_are_shown(out, capsys):
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 13, "wrong": "the loss is 9, far above", "done": "left out"}\n')
        log.write(
            '{"step": 14, "slow_rank": 1, "times_median": 2.5}\n{"step": 15, "rewound_from": 18, "wrong": "spike"}\n'
        )
    page = shown(capsys, out, "--no-samples")
    assert "alarms: 3" in page and "step 13: the loss is 9, far above; left out" in page
    assert "step 14: rank 1 computes 2.5 times as long" in page and "step 15: spike; went back from step 18" in page


def test_fine_tuning_is_shown_with_its_metric(out, capsys):
    """Its log has a metric; its checkpoint may have no whole model."""
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 13, "val_loss": 0.5, "accuracy": 0.75}\n')
    for file in (out / "last").glob("model*"):
        file.unlink()
    page = shown(capsys, out)
    assert "accuracy 0.7500" in page and "no sample: the checkpoint holds adapters" in page


def test_what_is_no_run(trained, tmp_path, capsys):
    assert f"there is no folder {tmp_path}/x (yet); start a run with gptfast train" in refused(capsys, tmp_path / "x")
    assert "is of another kind: it has no log.jsonl" in refused(capsys, tmp_path)
    assert f"watch the run itself: {trained}" in refused(capsys, trained / "last")
    assert f"watch one: {trained}" in refused(capsys, trained.parent)
    assert "is a file" in refused(capsys, trained / "log.jsonl")
    assert "--every is 0" in refused(capsys, trained, "--every", "0")
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnothing\n{"step": 3}\n')
    assert "log.jsonl, line 2 is not valid JSON" in refused(capsys, tmp_path)


def test_a_damaged_trainer_file_is_named(out, capsys):
    (out / "last/trainer.json").write_text("{")
    assert "trainer.json is not valid JSON" in refused(capsys, out)


def test_following_waits_for_the_run_and_ends_with_it(trained, tmp_path, monkeypatch):
    """In a terminal: nothing there yet, then it runs, then it has ended."""
    monkeypatch.chdir(tmp_path)
    out, console = Path("run"), Console(file=StringIO(), force_terminal=True, width=90, height=30)
    viewer = Viewer(Viewing(run=out, every=0.05, wait=True, samples=False), console)
    following = threading.Thread(target=viewer.follow)
    following.start()
    time.sleep(0.2)
    shutil.copytree(trained, tmp_path / "copy")
    lock = FileLock(tmp_path / "copy/training.lock")
    assert lock.acquire() is None
    (tmp_path / "copy").rename(out)
    time.sleep(0.4)
    assert following.is_alive()
    lock.path = out / "training.lock"
    (out / "training.lock").unlink()
    following.join(20)
    assert not following.is_alive()
    drawn = console.file.getvalue()
    assert "running (process" in drawn and "complete: all 12 steps are made" in drawn


def test_samples_cannot_steer_the_terminal():
    from gptfast.cli._watch_show import _plain

    assert _plain("a\x1b[2Jb\tc\n") == "a\N{REPLACEMENT CHARACTER}[2Jb    c\n"


def test_plots():
    lines, bounds = braille_plot([[(0, 0), (3, 3)]], 2, 1)
    assert bounds == (0, 3, 0, 3) and lines == [[("\u2860", 0), ("\u280a", 0)]]
    flat, _ = braille_plot([[], [(5, 2)]], 3, 1, ascii_only=True)
    assert "".join(sign for sign, _ in flat[0]) == "*  "
    assert sparkline([0, 7, 14], 3) == "▁▅█" and sparkline([], 3) == "" and sparkline([1, 1], 9) == "▄▄"
    with pytest.raises(ValueError, match="no point"):
        braille_plot([[]], 2, 2)
