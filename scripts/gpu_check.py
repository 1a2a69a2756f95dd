"""`make gpu-check`: everything that needs a machine with an NVIDIA GPU, in one command of under eight minutes.

The library is built (by make) and loads; every PTX wrapper does what its definition says; every op agrees with float64,
repeats bit for bit and draws what the CPU draws; compute-sanitizer finds nothing, where it is installed and may run; then
the benchmarks. Says plainly when there is no GPU, and passes nothing then.

    python scripts/gpu_check.py --try     what of it runs on a CPU: wrappers and benchmarks on the emulator
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
NO_GPU = "gpu-check: torch sees no NVIDIA GPU. Nothing was checked. (`gptfast doctor` says what this machine has.)"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
BENCH = [sys.executable, "benchmarks/bench_gpu.py"]
# One small case of every op; the sanitizer makes kernels many times slower.
SANITIZED = "test_parity and bf16 and (N3C15 or N7C33 or N3V15 or B1H1T1)"


def step(title: str, command: list[str], seconds: int) -> bool:
    """Runs a command of at most so many seconds, and tells whether it succeeded."""
    print(f"\n==== {title}: {' '.join(command)}", flush=True)
    begin = time.monotonic()
    try:
        ok = subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"==== {title}: not done after {seconds} seconds")
        return False
    print(f"==== {title}: {'passed' if ok else 'FAILED'} in {time.monotonic() - begin:.0f} s", flush=True)
    return ok


def sanitizer() -> bool:
    """compute-sanitizer; containers often forbid it, which is said and is no failure."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        print("\n==== compute-sanitizer is not installed: left out")
        return True
    touch = "import torch; torch.ones(1, device='cuda')"
    probe = subprocess.run([tool, sys.executable, "-c", touch], capture_output=True, text=True, check=False)
    if probe.returncode:
        print(f"\n==== compute-sanitizer does not run here: left out ({probe.stdout.strip()[-200:]})")
        return True
    tests = [*PYTEST, "-x", "tests/test_on_gpu.py", "-k", SANITIZED]
    results = [
        step(f"compute-sanitizer {kind}", [tool, f"--tool={kind}", "--error-exitcode=9", *tests], 40)
        for kind in ("memcheck", "racecheck")
    ]
    return all(results)


def trial() -> int:
    print("gpu-check --try: on the emulator; nothing of this is a check of a GPU")
    wrappers = [*PYTEST, "tests/test_conformance.py", "-k", "emulator"]
    results = [step("wrappers", wrappers, 300), step("benchmarks", [*BENCH, "--try"], 300)]
    return 0 if all(results) else 1


def main() -> int:
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    if "--try" in sys.argv:
        return trial()
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    from gptfast.backend import cuda_trouble

    if trouble := cuda_trouble(None):
        print(f"gpu-check: {torch.cuda.get_device_name()} cannot run the CUDA ops: {trouble}")
        return 1
    results = [
        step("PTX wrappers", [*PYTEST, "tests/test_conformance.py", "-m", "not slow"], 75),
        step("every op on the GPU", [*PYTEST, "tests/test_on_gpu.py"], 105),
        step("every op in Triton on the GPU", [*PYTEST, "tests/test_triton_on_gpu.py"], 60),
        sanitizer(),
        step("benchmarks", BENCH, 160),
    ]
    print(f"\ngpu-check: {'everything passed' if all(results) else 'FAILED, see above'}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
