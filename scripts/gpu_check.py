"""`make gpu-check`: everything that needs a machine with an NVIDIA GPU, in one command of under eight minutes.

The library is built and loads; every PTX wrapper does what its definition says; every op agrees with float64, repeats bit
for bit and draws what the CPU draws; compute-sanitizer finds nothing, where it is installed and may run; then the
benchmarks. A step that fails does not keep the others from running; the end tells of each how it went and how long it took.
Says plainly when there is no GPU, and passes nothing then.

    python scripts/gpu_check.py           in any environment that has torch and what pyproject.toml lists for tests
    python scripts/gpu_check.py --try     what of it runs on a CPU: wrappers, generation and benchmarks on the emulator
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 470  # for everything
NO_GPU = "gpu-check: torch sees no NVIDIA GPU. Nothing was checked. (`gptfast doctor` says what this machine has.)"
BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
LOADED = [
    sys.executable,
    "-c",
    "from gptfast.backend import cuda_trouble; t = cuda_trouble(None); print(t or 'the CUDA ops load'); exit(bool(t))",
]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
BENCH = [sys.executable, "benchmarks/bench_gpu.py"]
# One small case of every op; the sanitizer makes kernels many times slower.
SANITIZED = "test_parity and bf16 and (N3C15 or N7C33 or N3V15 or B1H1T1)"


@dataclass
class Check:
    """Runs steps one after the other and remembers how each went."""

    begin: float = field(default_factory=time.monotonic)
    results: list[tuple[str, str, float]] = field(default_factory=list)

    def step(self, title: str, command: list[str], seconds: float, needed: bool = True) -> str:
        """Runs a command of at most so many seconds. Returns "passed", "FAILED", or, where the time ran out, "FAILED" or, of
        what is not needed, "left out"."""
        start = time.monotonic()
        seconds = min(seconds, self.begin + SECONDS - start)
        print(f"\n==== {title}: {' '.join(command)}", flush=True)
        outcome = "FAILED: no time was left"
        if seconds > 0:
            try:
                code = subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode
                outcome = "FAILED" if code else "passed"
            except subprocess.TimeoutExpired:
                outcome = f"FAILED: not done after {seconds:.0f} s"
        if outcome.startswith("FAILED:") and not needed:
            outcome = outcome.replace("FAILED", "left out")
        self.note(title, outcome, time.monotonic() - start)
        return outcome

    def note(self, title: str, outcome: str, seconds: float = 0.0) -> None:
        self.results.append((title, outcome, seconds))
        print(f"==== {title}: {outcome}, {seconds:.0f} s", flush=True)

    def report(self) -> int:
        failed = [title for title, outcome, _ in self.results if outcome.startswith("FAILED")]
        print(f"\n{'gpu-check':36}{'seconds':>8}")
        for title, outcome, seconds in self.results:
            print(f"{title:36}{seconds:>8.0f}  {outcome}")
        print(f"{'together':36}{time.monotonic() - self.begin:>8.0f}")
        print(f"gpu-check: {'FAILED: ' + ', '.join(failed) if failed else 'everything passed'}")
        return 1 if failed else 0


def in_parallel(workers: int) -> list[str]:
    """pytest's options for so many processes, where pytest-xdist is installed and so many cores are there."""
    workers = min(workers, (os.cpu_count() or 1) // 2)
    return ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []


def sanitize(check: Check) -> None:
    """compute-sanitizer; containers often forbid it, which is said and is no failure."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return check.note("compute-sanitizer", "left out: not installed")
    touch = "import torch; torch.ones(1, device='cuda')"
    start = time.monotonic()
    try:
        probe = subprocess.run(
            [tool, sys.executable, "-c", touch], capture_output=True, text=True, check=False, timeout=60
        )
        said = probe.stdout.strip()[-200:] if probe.returncode else ""
    except subprocess.TimeoutExpired:
        said = "not done after 60 s"
    if said:
        return check.note("compute-sanitizer", f"left out: does not run here ({said})", time.monotonic() - start)
    tests = [*PYTEST, "-x", "tests/test_on_gpu.py", "-k", SANITIZED]
    for kind in ("memcheck", "racecheck"):
        command = [tool, f"--tool={kind}", "--error-exitcode=9", *tests]
        check.step(f"compute-sanitizer {kind}", command, 45, needed=False)
    return None


def trial() -> int:
    print("gpu-check --try: on the emulator; nothing of this is a check of a GPU")
    check = Check()
    check.step("PTX wrappers", [*PYTEST, "tests/test_conformance.py", "-k", "emulator"], 300)
    check.step("generation in captured steps", [*PYTEST, "tests/test_graphed.py"], 300)
    check.step("benchmarks", [*BENCH, "--try"], 300)
    return check.report()


def main() -> int:
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    if "--try" in sys.argv:
        return trial()
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    print(f"gpu-check: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    os.environ.setdefault("GPTFAST_CUDA", "1")
    check = Check()
    if check.step("build", BUILD, 300) == "passed" and check.step("the library loads", LOADED, 60) == "passed":
        check.step("PTX wrappers", [*PYTEST, "tests/test_conformance.py", "-m", "not slow"], 75)
        check.step("every op on the GPU", [*PYTEST, *in_parallel(6), "tests/test_on_gpu.py"], 120)
        check.step("every op in Triton on the GPU", [*PYTEST, *in_parallel(6), "tests/test_triton_on_gpu.py"], 60)
        for part in ("memory", "attention", "decode"):
            check.step(f"benchmarks: {part}", [*BENCH, "--only", part], 90)
        sanitize(check)
        check.step("benchmarks: training", [*BENCH, "--only", "training"], 150)
    return check.report()


if __name__ == "__main__":
    sys.exit(main())
