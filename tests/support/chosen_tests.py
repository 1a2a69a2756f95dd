"""Chosen tests of several files in one pytest of its own: a process that needs another environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from tests.support import ROOT


def passed(chosen: Mapping[str, str], folder: Path, *options: str, **environment: str) -> dict[str, int]:
    """`chosen`: a pytest expression (-k) for each file below tests/. How many tests passed, by file; none may fail."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options]
    expression = " or ".join(f"{Path(file).name} and ({tests})" for file, tests in chosen.items())
    result = subprocess.run(
        [*command, "-k", expression, *(f"tests/{file}" for file in chosen)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    count = Counter(
        case.get("classname", "").removeprefix("tests.").replace(".", "/") + ".py"
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("skipped") is None
    )
    return {file: count[file] for file in chosen}
