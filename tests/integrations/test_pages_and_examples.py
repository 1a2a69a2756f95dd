"""docs/drop-in.md and the examples run."""

from __future__ import annotations

import json
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
    "own_text.py": ["README.md", "--steps", "4", "--out", "OUT"],
    "classifier.py": ["MODEL", "DATA", "--steps", "2", "--out", "OUT"],
    "two_kernels.py": ["--steps", "3"],
    "image_captions.py": ["--steps", "2", "--batch-size", "4"],
    "gpt_and_bert.py": ["--steps", "2", "--width", "16", "--passages", "4", "--out", "OUT"],
    "needle.py": ["--steps", "2", "--batch-size", "4", "--trials", "1", "--out", "OUT"],
}
LONG = ("image_captions.py", "gpt_and_bert.py", "needle.py")  # at most 150 lines, the others 99
PICTURES = {"gpt_and_bert.py": {"who-attends.png"}, "needle.py": {"needle.png"}}
PRINTED = {
    "openai_client.py": "---- a chat",
    "classifier.py": "parameters trained in 2 steps",
}  # the others print losses


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
    made = {"MODEL": tmp_path / "model", "DATA": tmp_path / "data.jsonl", "OUT": tmp_path / "out"}
    if "MODEL" in EXAMPLES[name]:
        tokenizer = tokenizer_with("")
        gpt(tokenizer.vocab_size, block_size=96).save_pretrained(made["MODEL"])
        tokenizer.save(made["MODEL"])
        rows = [{"text": "the cat " * (n % 3 + 1), "label": "short" if n % 3 == 0 else "long"} for n in range(24)]
        made["DATA"].write_text("\n".join(map(json.dumps, rows)))
    arguments = [str(made.get(argument, argument)) for argument in EXAMPLES[name]]
    path: Path = ROOT / "examples" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (150 if name in LONG else 99)
    done = subprocess.run([sys.executable, path, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert PRINTED.get(name, "loss") in done.stdout
    assert PICTURES.get(name, set()) <= {file.name for file in made["OUT"].glob("*.png")}
    assert "INFO:" not in done.stdout, "the log of a server is not what the example prints"
