"""`gptfast train` in a test: a text, a small model, and the command in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gptfast.cli import main

TEXT = "Is this a dagger which I see before me,\nThe handle toward my hand? Come, let me clutch thee.\n" * 30
SHAPE = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16"]
SMALL = [*SHAPE, "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
SCHEDULE = ["--max-steps", "12", "--eval-every", "3", "--eval-batches", "2", "--log-every", "1"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that no test changes."""
    path = tmp_path_factory.mktemp("text") / "dagger.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(autouse=True)
def _threads(threads: None) -> None:
    """--threads is for the process; put it back."""


def gptfast(*arguments: str | Path) -> int:
    """Run the command in this process; its exit code."""
    sys.argv = ["gptfast", *map(str, arguments)]
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code or 0


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def run(text: str, out: Path, *more: str) -> int:
    return gptfast("train", "--data", text, *SMALL, *SCHEDULE, "--out", out, *more)
