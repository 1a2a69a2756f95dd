"""The checkpoints before the last one, and runs that resume by themselves or from the newest that is intact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from gptfast._snapshots import is_ours
from gptfast.training.checksums import verify
from gptfast.training.log import read_log
from tests.support.train_command import gptfast, run

OFTEN = ["--checkpoint-every", "2", "--eval-every", "5"]


def steps(out: Path) -> dict[str, int]:
    return {p.parent.name: json.loads(p.read_text())["state"]["step"] for p in sorted(out.glob("*/trainer.json"))}


def spoil(folder: Path, name: str = "model.safetensors") -> None:
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)


def test_the_newest_are_kept_and_a_damaged_one_is_reported_and_passed_over(text, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(text, whole, *OFTEN) == 0
    assert run(text, out, *OFTEN, "--keep-last", "3", "--lr-decay-steps", "12", "--max-steps", "9") == 0
    assert steps(out)["last"] == 9
    assert sorted(p.name for p in out.glob("step-*")) == ["step-000006", "step-000008"]
    spoil(out / "last")
    spoil(out / "step-000008", "optimizer.safetensors")
    if (out / "best").exists():
        shutil.rmtree(out / "best")
    capsys.readouterr()
    assert gptfast("train", "--resume", "--out", out, "--max-steps", "12") == 0
    printed = capsys.readouterr().out
    assert "damaged checkpoint" in printed and "last/model.safetensors is not what was saved: its checksum" in printed
    assert "step-000008/optimizer.safetensors is not what was saved" in printed
    assert "resume   from step 6" in printed
    a, b = (load_file(folder / "last/model.safetensors") for folder in (whole, out))
    assert all(a[name].equal(b[name]) for name in a)
    found = [r["step"] for r in read_log(out / "log.jsonl") if "loss" in r]
    assert found == list(range(1, 13))


def test_kept_checkpoints_have_the_average_of_the_weights(text, tmp_path, capsys):
    """They are copies of OUT/last: with --ema each of them, and OUT/best, used to lack a file, and none could be resumed."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(text, whole, *OFTEN, "--ema", "0.5", "--max-steps", "8") == 0
    short = [*OFTEN, "--ema", "0.5", "--keep-last", "2", "--lr-decay-steps", "8", "--max-steps", "6"]
    assert run(text, out, *short) == 0
    assert all(is_ours(file.name) for file in (out / "last").iterdir()), "a save that is killed would not be completed"
    assert [p.name for p in out.glob("step-*")] == ["step-000005"], "the evaluation's; not the last step once more"
    for folder in ("best", "step-000005"):
        assert {p.name for p in (out / folder).iterdir()} == {p.name for p in (out / "last").iterdir()}, folder
        verify(out / folder)
    spoil(out / "last")
    shutil.rmtree(out / "best")
    capsys.readouterr()
    assert gptfast("train", "--resume", "--out", out, "--max-steps", "8") == 0
    assert "resume   from step 5" in capsys.readouterr().out
    for name in ("model", "ema"):
        a, b = (load_file(folder / f"last/{name}.safetensors") for folder in (whole, out))
        assert all(a[key].equal(b[key]) for key in a)


def test_auto_begins_resumes_and_refuses_where_all_are_damaged(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(text, out, *OFTEN, "--resume", "auto", "--max-steps", "4", "--lr-decay-steps", "12") == 0
    assert "resume " not in capsys.readouterr().out.split("plan")[1].split("\n")[1]
    again = [*OFTEN, "--resume", "auto", "--max-steps", "6", "--keep-last", "2", "--lr-decay-steps", "12"]
    assert run(text, out, *again) == 0
    assert "resume   from step 4" in capsys.readouterr().out
    assert run(text, out, *again) == 0  # complete: nothing to do
    assert steps(out)["last"] == 6
    for folder in {p.parent for p in out.glob("*/trainer.json")}:
        (folder / "trainer.json").write_text("{")
    capsys.readouterr()
    assert run(text, out, *again) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: every checkpoint in") and "damaged" in said
    assert run(text, out, "--overwrite") == 0
    assert not list(out.glob("step-*"))


def test_a_newer_version_is_refused_and_nothing_is_passed_over(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(text, out, *OFTEN, "--keep-last", "2", "--max-steps", "4") == 0
    path = out / "last/trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    capsys.readouterr()
    assert gptfast("train", "--resume", "--out", out, "--max-steps", "12") == 1
    assert "has version 99; expected version 2" in capsys.readouterr().err
