"""What nvcc and ptxas said of each unit, kept beside its object: a unit that has not changed is not compiled again to hear it."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.support import ROOT

SCRIPT = """#!/bin/sh
# {version}
out= before=
for word in "$@"; do [ "$before" = -o ] && out=$word; before=$word; done
[ -n "$out" ] || exec {nvcc} "$@"
{nvcc} "$@" {flags} >"$out.said" 2>&1
code=$?
cat "$out.said"
exit $code
"""


def keeping_nvcc(nvcc: str, *flags: str) -> Path:
    """A script in the place of nvcc that adds `flags`, and keeps what is said of an object beside it, as `….o.said`.

    The folder is named after the script, with nvcc's version: where any of it is another one, ninja sees another command,
    and compiles.
    """
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    lines = " ".join(version.split())
    text = SCRIPT.format(version=lines, nvcc=shlex.quote(nvcc), flags=shlex.join(flags))
    script = ROOT / f"build/nvcc/{hashlib.sha256(text.encode()).hexdigest()[:16]}/bin/nvcc"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text)
    script.chmod(0o755)
    return script


def said(objects: Iterable[Path]) -> str:
    """What was said when these were compiled."""
    return "".join(path.with_name(f"{path.name}.said").read_text() for path in objects)
