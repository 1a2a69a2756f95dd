"""What is wrong with this machine's setting, and the next command for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptfast._busy import BUSY, usable_cores

if TYPE_CHECKING:
    from gptfast.benchmarking.self_test import OpResult

SLOWER = 0.9  # of torch's speed; above it is noise


@dataclass(frozen=True)
class Problem:
    """A problem, and the command that mends it or says more."""

    problem: str
    next: str


def find_problems(results: list[OpResult], dtype: str, waited: float | None) -> list[Problem]:
    """What keeps this machine from its speed, or makes results wrong.

    Args:
        results: of the self-test.
        dtype: that was asked about, such as "bfloat16".
        waited: the part of the self-test's time in which its threads waited for a core; None: unknown.
    """
    return [*_of_the_library(), *_of_the_machine(dtype, waited), *_of_the_ops(results, waited)]


def _of_the_library() -> list[Problem]:
    import torch

    from gptfast import backend

    found = []
    if backend.missing_reason is not None:
        found.append(Problem(f"no compiled ops: {backend.missing_reason}", backend.REBUILD))
    elif backend.cpu_isa() != (best := backend.cpu_isas()[-1]):
        why = f"the CPU kernels run on {backend.cpu_isa()}, and this CPU has {best}"
        found.append(Problem(why, "unset GPTFAST_CPU_ISA"))
    elif best == "scalar" and (better := torch.backends.cpu.get_cpu_capability()) not in ("DEFAULT", "default"):
        why = f"the CPU kernels run without vector instructions, and torch finds {better} here"
        found.append(Problem(why, backend.REBUILD))
    if torch.cuda.is_available() and (reason := backend.unavailable_reason("cuda")):
        found.append(Problem(f"the GPU runs no CUDA kernels: {reason}", f"GPTFAST_CUDA=1 {backend.REBUILD}"))
    if (asked := backend.chosen()) != "auto":
        found.append(Problem(f"GPTFAST_BACKEND asks for {asked}", "unset GPTFAST_BACKEND"))
    return found


def _of_the_machine(dtype: str, waited: float | None) -> list[Problem]:
    import torch

    from gptfast.machine import bfloat16_instructions
    from gptfast.malloc import ENVIRONMENT, keeps_memory

    found, threads, cores = [], torch.get_num_threads(), usable_cores()
    if waited is not None and waited >= BUSY:
        why = f"the machine is busy: threads waited {waited:.0%} of their time for a core that other programs used"
        found.append(Problem(why, "top   # then `gptfast doctor` again when nothing else runs"))
    if threads > cores:
        why = f"{threads} threads on {cores} cores wait for one another"
        found.append(Problem(why, f"export OMP_NUM_THREADS={cores}"))
    elif threads < (cores + 1) // 2:
        why = f"{threads} of {cores} cores are used"
        found.append(Problem(why, "unset OMP_NUM_THREADS MKL_NUM_THREADS"))
    if keeps_memory() is False:
        why = "malloc returns large buffers to the system after each use (`gptfast train` changes that, scripts do not)"
        found.append(Problem(why, f"export {ENVIRONMENT}   # or gptfast.tune_malloc() in the script"))
    if dtype == "bfloat16" and not torch.cuda.is_available() and bfloat16_instructions() is None:
        found.append(Problem("this CPU has no fast bfloat16", "gptfast doctor --dtype float32"))
    return found


def _of_the_ops(results: list[OpResult], waited: float | None) -> list[Problem]:

    found = []
    quiet = waited is None or waited < BUSY
    for r in results:
        if r.wrong:
            found.append(Problem(f"{r.op} is wrong on {r.backend}: {r.wrong}", "export GPTFAST_BACKEND=eager"))
        elif r.backend == "none":
            found.append(Problem(r.reason, "unset GPTFAST_BACKEND"))
        elif quiet and r.ratio is not None and r.ratio < SLOWER:
            found.append(Problem(f"{r.op} has {r.ratio:.2f}x the speed of {r.peer}", f"gptfast bench {r.op}"))
    return found
