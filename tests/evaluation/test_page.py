"""docs/evaluation.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import gptfast
from gptfast.tokenizer import CharTokenizer, load_tokenizer
from tests.support import ROOT

TEXT = "To be, or not to be: that is the question.\n" * 4


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Block after block in one session, with small models of random weights in the place of those that it names."""
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.0}
    for folder, tokenizer in (("runs/bard/best", CharTokenizer.train(TEXT)), ("gpt2", load_tokenizer("gpt2"))):
        config = gptfast.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=512, **sizes)
        gptfast.GPT(config).save_pretrained(tmp_path / folder)
        tokenizer.save(tmp_path / folder)
    (tmp_path / "sonnets.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for n, code in enumerate(blocks):
        exec(compile(code, f"evaluation.md, block {n}", "exec"), names)
    bits, packed, undone, scores, *rest = capsys.readouterr().out.splitlines()
    assert abs(float(packed) - float(undone)) < 0.05 and abs(float(bits) - float(packed)) < 0.1
    assert "'positive': -" in scores and len(rest) == 1 and rest[0].startswith("Agreement(answer=")
