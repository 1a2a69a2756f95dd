"""Native calls that do not fit together are refused, on the CPU and in the CUDA glue; see native_calls.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gptfast.backend import has_cpu_ops
from tests.support import ROOT, emulated

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")


@pytest.mark.slow
@pytest.mark.parametrize("namespace", ["gptfast", "gptfast_emu"])
def test_every_argument_of_every_op(namespace: str) -> None:
    """Each tensor of another dtype, shape, layout and device, each number out of range: an error or finite values."""
    if namespace == "gptfast_emu":
        emulated.build()
    command = [sys.executable, "-m", "tests.support.native_calls", namespace]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1:] == ["done"], (done.returncode, lines[-1:], done.stderr[-2000:])
    assert [line for line in lines if line.startswith("FAULT")] == []
    assert len(lines) > 700, "fewer cases than there are"
