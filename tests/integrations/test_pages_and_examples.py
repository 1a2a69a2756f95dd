"""docs/drop-in.md and the examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.finetuning.models import gpt
from tests.support import ROOT
from tests.support.chat_templates import tokenizer_with

pytest.importorskip("transformers")
EXAMPLES = {
    "accelerate_trainer.py": ["README.md", "--steps", "2"],
    "nanogpt_loop.py": ["README.md", "--steps", "2"],
    "llama_attention.py": ["--length", "32"],
    "openai_client.py": ["MODEL", "--prompt", "the cat", "--tokens", "5"],
}
PRINTED = {"openai_client.py": "---- a chat"}  # the others print losses


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
def test_examples_run(name: str, tmp_path: Path):
    arguments = EXAMPLES[name]
    if "MODEL" in arguments:
        tokenizer = tokenizer_with("")
        gpt(tokenizer.vocab_size, block_size=96).save_pretrained(tmp_path)
        tokenizer.save(tmp_path)
        arguments = [str(tmp_path) if argument == "MODEL" else argument for argument in arguments]
    path: Path = ROOT / "examples" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    done = subprocess.run([sys.executable, path, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert PRINTED.get(name, "loss") in done.stdout
