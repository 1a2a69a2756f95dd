"""gptfast train: the memory that a step needs."""

from __future__ import annotations

from gptfast.training import memory
from tests.support.train_command import SMALL, gptfast


def test_a_batch_of_millions_of_tokens_is_refused(text, tmp_path, capsys):
    command = ["train", "--data", text, *SMALL, "--max-steps", "1", "--out", tmp_path / "run"]
    assert gptfast(*command, "--batch-size", "80000000") == 1
    said = capsys.readouterr().err
    assert (
        said.startswith("error: a step needs at least") and "GB in all; take fewer rows a pass (--batch-size)" in said
    )


def test_a_run_that_takes_more_than_half_says_so(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "_memory", lambda device: (1, 10**18))
    command = ["train", "--data", text, *SMALL, "--max-steps", "1", "--out", tmp_path / "run"]
    assert gptfast(*command) == 0
    assert "memory   at least" in capsys.readouterr().out
