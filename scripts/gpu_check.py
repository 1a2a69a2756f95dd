"""`make gpu-check`: everything that needs a machine with an NVIDIA GPU, in one command.

The library is built (by make) and loads; every op agrees with float64 and repeats bit for bit; compute-sanitizer finds
nothing, where it is installed and may run; then the benchmarks. Says plainly when there is no GPU, and passes nothing then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NO_GPU = "gpu-check: torch sees no NVIDIA GPU. Nothing was checked. (`gptfast doctor` says what this machine has.)"


def step(title: str, *command: str) -> bool:
    print(f"\n==== {title}: {' '.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def sanitizer() -> bool:
    """compute-sanitizer over one small case of every op; containers often forbid it, which is said and is no failure."""
    tool = shutil.which("compute-sanitizer")
    tests = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "tests/test_on_gpu.py",
        "-k",
        "test_parity and (N3C15 or N7C33 or N3V15) and bf16",
    ]
    if tool is None:
        print("\n==== compute-sanitizer is not installed: left out")
        return True
    probe = subprocess.run([tool, sys.executable, "-c", "0"], capture_output=True, text=True, check=False)
    if probe.returncode:
        print(f"\n==== compute-sanitizer does not run here: left out ({probe.stdout.strip()[-200:]})")
        return True
    return all(
        step(f"compute-sanitizer {kind}", tool, f"--tool={kind}", "--error-exitcode=9", sys.executable, *tests)
        for kind in ("memcheck", "racecheck", "initcheck")
    )


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    from gptfast.backend import cuda_trouble

    if trouble := cuda_trouble(None):
        print(f"gpu-check: {torch.cuda.get_device_name()} cannot run the CUDA ops: {trouble}")
        return 1
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    ok = step("every op on the GPU", sys.executable, "-m", "pytest", "-q", "tests/test_on_gpu.py")
    ok = (
        step("every op in Triton on the GPU", sys.executable, "-m", "pytest", "-q", "tests/test_triton_on_gpu.py")
        and ok
    )
    ok = sanitizer() and ok
    ok = step("benchmarks", sys.executable, "benchmarks/bench_gpu.py") and ok
    print(f"\ngpu-check: {'everything passed' if ok else 'FAILED, see above'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
