"""`make gpu-check PART=…`: what needs a machine with an NVIDIA GPU, in parts of under eight minutes, the build included.

    ops      every PTX wrapper does what its definition says; every op agrees with float64, repeats bit for bit and draws what
             the CPU draws; compute-sanitizer finds nothing in one small call of each kernel
    speed    ceilings, ops that move memory, attention, each beside its peers; without Triton
    family   the ops of Llama-shaped GPTs and of gpt-oss that move memory, each beside its peers; without Triton
    model    generation and training of GPT-2
    triton   the Triton kernels: parity untuned, then how long compiling and tuning take
    profile  Nsight Compute's counters of every kernel

Without PART all of them, one after the other. A step that fails keeps no other from running; one that takes too long is cut
off, keeps the rows that it has written, and says what is missing. How each step went is appended to
benchmarks/results/gpu_runs.jsonl with commit, date, GPU and driver; measurements go to benchmarks/results/<gpu>.jsonl.
Says plainly when there is no GPU, and passes nothing then.

    python scripts/gpu_check.py [PART …]          in any environment with torch and what pyproject.toml lists for tests
    python scripts/gpu_check.py --try [PART …]    the same steps as far as a CPU runs them, on the emulator
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from gpu_steps import BENCH, ROOT, Check, in_parallel, tool

sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu.provenance import provenance

NO_GPU = "gpu-check: torch sees no NVIDIA GPU. Nothing was checked. (`gptfast doctor` says what this machine has.)"
LOADED = (
    "from gptfast.backend import unavailable_reason; reason = unavailable_reason('cuda'); "
    "print(reason or 'the CUDA ops load'); exit(bool(reason))"
)
OPS = "every op on the GPU"
SMALL = [sys.executable, "scripts/gpu_small.py"]
REFUSES = "in containers the counters are often kept for the administrator: NVreg_RestrictProfilingToAdminUsers=0"


def build(check: Check) -> bool:
    """The library for the GPU at hand alone."""
    if check.trial:
        return True
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = check.step("build", command, 240) == "passed"
    return built and check.step("the library loads", [sys.executable, "-c", LOADED], 60) == "passed"


def ops(check: Check) -> None:
    place = "emulator" if check.trial else "gpu"
    check.tests("PTX wrappers", ["tests/cuda/test_conformance.py", "-m", "not slow", "-k", place], 75)
    check.tests(OPS, [*in_parallel(8), "tests/cuda/test_on_gpu.py"], 150)
    for kind in ("memcheck", "racecheck"):
        sanitizer = tool("compute-sanitizer")
        title = f"compute-sanitizer {kind}"
        if sanitizer is None and not check.trial:
            check.note(title, "left out: not installed")
            continue
        options = [sanitizer, f"--tool={kind}", "--error-exitcode=9", "--kernel-name=kns=gptfast"] if sanitizer else []
        check.step(title, [*options, *SMALL, *check.trying], 60, needed=False)


def speed(check: Check) -> None:
    for part, seconds in (("ceilings", 30), ("memory", 160), ("packed", 60), ("attention", 150)):
        check.rows(f"benchmarks: {part}", [*BENCH, "--no-triton", "--only", part], seconds)


def family(check: Check) -> None:
    check.rows("benchmarks: family", [*BENCH, "--no-triton", "--only", "family"], 200)


def model(check: Check) -> None:
    for part, seconds in (("decode", 160), ("training", 260)):
        check.rows(f"benchmarks: {part}", [*BENCH, "--no-triton", "--only", part], seconds)


def triton(check: Check) -> None:
    """Tuning compiles every candidate, so the tests run without; what it takes is measured apart."""
    untuned = {"GPTFAST_TRITON_TUNE": "0"}
    tests = [*in_parallel(8), "tests/triton/test_triton_on_gpu.py"]
    check.tests("every op in Triton on the GPU", [*tests, "-k", "not tiling"], 160, untuned)
    check.rows("Triton: compiling and tuning", [*BENCH, "--only", "tuning"], 80)
    check.tests("every tiling of attention", [*tests, "-k", "tiling"], 100, untuned)


def profile(check: Check) -> None:
    ncu = tool("ncu")
    if ncu is None and not check.trial:
        return check.note("Nsight Compute", "left out: ncu is not installed (package nsight-compute)")
    out = os.environ.get("OUT") or str(check.results)
    options = [
        ncu,
        "--clock-control=none",
        "--set=full",
        "--kernel-name-base=demangled",
        "-k",
        "regex:gptfast",
        "-c",
        "110",
        "-f",
        "-o",
        f"{out}/gpu",
    ]
    command = [*(options if ncu else []), *SMALL, "--real", *check.trying]
    outcome = check.step("Nsight Compute", command, 240, needed=False)
    if outcome != "passed":
        print(f"Nsight Compute did not run through; {REFUSES}")
    return None


PARTS = {"ops": ops, "speed": speed, "family": family, "model": model, "triton": triton, "profile": profile}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them unless said")
    parser.add_argument("--try", action="store_true", dest="trial", help="on the emulator")
    options = parser.parse_args(arguments)
    if not options.trial and not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    os.environ["OMP_NUM_THREADS"] = "2"  # of a test worker: float64 references on all cores would wait for one another
    if options.trial:
        print("gpu-check --try: on the emulator; nothing of this is a check of a GPU")
    else:
        os.environ["GPTFAST_CUDA"] = "1"
        os.environ["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability()))
    head = provenance()
    print("gpu-check: " + ", ".join(f"{key} {value}" for key, value in head.items()), flush=True)
    status = 0
    for name in options.parts or PARTS:
        check = Check(name, head, options.trial)
        if build(check):
            PARTS[name](check)
        status |= check.report()
    return status


def last_run(path: Path) -> str:
    """When the GPU tests last ran, for the notes."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = [row for row in rows if row["step"] == OPS and row["outcome"] == "passed"]
    return f"{done[-1]['date']}, {done[-1]['gpu']}, kernels of {done[-1]['kernels']}" if done else "never"


if __name__ == "__main__":
    sys.exit(main())
