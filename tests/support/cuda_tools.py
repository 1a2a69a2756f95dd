"""The CUDA toolkit's disassembler."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest


def cuobjdump(*options: str) -> str:
    """Output of the toolkit's cuobjdump, or of the packages nvidia-cuda-cuobjdump and -nvdisasm."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin"
    path = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin", str(packaged)])
    if not all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")):
        pytest.skip("no disassembler: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    command = [str(shutil.which("cuobjdump", path=path)), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert result.returncode == 0, result.stderr[-1000:]
    return result.stdout


def nvcc_flags() -> list[str]:
    """setup.py's flags for every CUDA unit."""
    from buildtools.libraries import NVCC_FLAGS

    return NVCC_FLAGS


@functools.cache
def functions(library: Path, arch: str) -> dict[str, str]:
    """Name to instructions."""
    text = cuobjdump("--dump-sass", "--gpu-architecture", arch, str(library))
    return dict(part.split("\n", 1) for part in text.split("Function : ")[1:])


def loads_at_once(text: str) -> int:
    """The most 8- and 16-byte loads from memory of a function that are asked for before one of their registers is used.

    text: of `functions`. Branches are taken as they lie; a load that is on its way from one turn of a loop to the next counts
    where it is asked for.
    """
    waiting: list[set[int]] = []
    most = 0
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", text):
        used = {int(n) for n in re.findall(r"\bR(\d+)", instruction)}
        if match := re.search(r"LDG\.E\.(64|128)\S* R(\d+), \S*\[R(\d+)", instruction):
            width, first, address = int(match[1]) // 32, int(match[2]), int(match[3])
            used = {address, address + 1}
        if any(used & registers for registers in waiting):
            waiting.clear()
        if match:
            waiting.append(set(range(first, first + width)))
            most = max(most, len(waiting))
    return most
