"""The op tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer (`make test-sanitize`).

Builds into a copy of the package, so that the installed one stays as it is. Leaks are not looked for: Python and torch
keep memory to the end of the process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=alignment,vptr -fno-sanitize-recover=undefined -g1"
TESTS = ["gelu", "layer_norm", "dropout", "cross_entropy", "linear", "sample", "causal_attention", "embedding"]
TESTS += ["results", "parallel"]


def runtime() -> str:
    """What has to be loaded before Python: AddressSanitizer, and the C++ library whose exceptions it wraps."""
    names = ("libasan.so", "libstdc++.so")
    commands = [["g++", f"-print-file-name={name}"] for name in names]
    return " ".join(subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in commands)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "gptfast"
        skipped = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "*.so", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=skipped)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=copy, check=True, env={**os.environ, "CXX": f"g++ {SANITIZE}"})
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(copy),
            "GPTFAST_GEMM": "own",
        }
        # without what starts processes of its own, inductor among them, and without the emulated CUDA kernels
        chosen = "not compile and not memory and not tune_malloc and not environment and not emu"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", chosen, "-p", "no:cacheprovider"]
        command += [f"tests/ops/test_{name}.py" for name in TESTS] + sys.argv[1:]
        return subprocess.run(command, cwd=copy, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
