"""docs/finetuning.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="not run from the source tree")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/finetuning.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {}
    for n, code in enumerate(blocks):
        exec(compile(code, f"finetuning.md, block {n}", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0]) > 0.9
    assert printed[2] == "or not to be<|im_end|>"
