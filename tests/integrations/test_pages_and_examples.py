"""docs/drop-in.md and the examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytest.importorskip("transformers")
EXAMPLES = {
    "accelerate_trainer.py": ["README.md", "--steps", "2"],
    "nanogpt_loop.py": ["README.md", "--steps", "2"],
    "llama_attention.py": ["--length", "32"],
}


def test_the_page_runs(capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/drop-in.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    namespace: dict[str, Any] = {}
    for n, code in enumerate(blocks):
        exec(compile(code, f"drop-in.md, block {n}", "exec"), namespace)
    printed = capsys.readouterr().out
    page = (ROOT / "docs/drop-in.md").read_text(encoding="utf-8")
    shown = re.search(r"    replaced\n(.*?)    +\.\.\.", page, re.S)
    assert shown and all(line.strip() in printed for line in shown[1].splitlines())


def test_every_example_is_run():
    assert sorted(EXAMPLES) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str):
    path: Path = ROOT / "examples" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    done = subprocess.run(
        [sys.executable, path, *EXAMPLES[name]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
