"""The CUDA toolkit's disassembler."""

from __future__ import annotations

import functools
import os
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
    """Name to instructions, which `tests.support.sass.code_of` reads."""
    text = cuobjdump("--dump-sass", "--gpu-architecture", arch, str(library))
    return dict(part.split("\n", 1) for part in text.split("Function : ")[1:])
