"""torch.set_default_dtype and set_default_device change what new modules are made of, and nothing else; see
whole_surface.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gptfast.backend import has_cpu_ops
from tests.support import ROOT

DEFAULTS = ["bfloat16", "float16", "float64", "meta"]
pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")


@pytest.mark.slow
def test_answers_do_not_depend_on_torch_defaults(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.whole_surface", str(tmp_path), *DEFAULTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1:] == ["done"], (done.returncode, lines[-1:], done.stderr[-2000:])
    assert [line for line in lines if line.startswith("FAULT")] == []
    assert len(lines) > 4 * 80, "fewer cases than there are"
