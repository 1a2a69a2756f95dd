"""Builds the compiled part of gptfast: shared objects, by ninja, without importing torch.

    gptfast/_ops.so        every tensor op on the CPU, through the libtorch stable ABI: one binary for torch >= 2.11
    gptfast/_cuda_ops.so   the same ops on CUDA; loaded only where torch sees a GPU
    gptfast/_C.abi3.so     build information and the inference engine (csrc/engine, without torch), for Python >= 3.10

GPTFAST_BUILD=0 installs pure Python: every op then runs in eager PyTorch.
GPTFAST_CUDA=auto|1|0: build the CUDA ops where nvcc is found and torch is a CUDA build (auto), always, or never.
TORCH_CUDA_ARCH_LIST names the GPUs, as for torch's own extensions, such as "8.0;9.0+PTX", the default; with nvcc 12.8 or newer
that is "8.0;9.0+PTX;10.0;12.0+PTX". 9.0 is built as 9.0a, which has wgmma and TMA and runs on every GPU of capability 9.0;
GPUs below 8.0 are left out.
GPTFAST_TORCH: the folder torch of an unpacked wheel, for a cross build: CXX="python -m ziglang c++ -target aarch64-macos.14.0".
MAX_JOBS bounds the number of compilers at work, CXX names the compiler.

Objects stay in build/objects, so that every kind of install compiles only what changed. A build in place also writes
compile_commands.json, for clangd and others. What is compiled is in buildtools/libraries.py.

`python setup.py build_emu [--variant=race|asan]` builds build/emu/…/emu_ops.so for the tests: the CUDA kernels on the CPU.
`python setup.py build_checks` builds build/checks/…/checks: a program that checks the CPU kernels, for the machine that CXX
compiles for; it needs no torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools import __version__ as setuptools_version
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file from elsewhere

from buildtools.libraries import isas, libraries  # noqa: E402
from buildtools.ninja_file import run_ninja  # noqa: E402
from buildtools.toolchain import (  # noqa: E402
    BUILD_TOOLS,
    OLDEST_GPU,
    Cuda,
    fail,
    find_cuda,
    find_torch,
    objects_folder,
    wanted_cuda,
    wheel_platform,
)


def say_what_was_built(cuda: Cuda | None, reason: str) -> None:
    if cuda and cuda.left_out:
        print(
            f"gptfast: TORCH_CUDA_ARCH_LIST names {', '.join(cuda.left_out)}: left out, the kernels need {OLDEST_GPU}"
        )
    what = f"the CUDA ops ({cuda.describe()})" if cuda else f"no CUDA ops: {reason}"
    print(f"gptfast: built the CPU ops ({', '.join(isas())}); {what}")


class NinjaBuild(build_ext):
    """`build_ext` that hands everything to ninja: per-file flags and incremental builds."""

    def finalize_options(self) -> None:
        if self.build_temp is None:  # pip names a temporary folder, which would compile everything each time
            self.build_temp = str(ROOT / objects_folder())
        super().finalize_options()

    def run(self) -> None:
        out_dir = ROOT if self.inplace else Path(self.build_lib).resolve()
        (out_dir / "gptfast").mkdir(parents=True, exist_ok=True)
        for other in out_dir.glob("gptfast/_C.cpython-*.so"):  # of older versions; Python would prefer it
            other.unlink()
        torch = find_torch()
        cuda, reason = wanted_cuda(torch)
        database = ROOT / "compile_commands.json" if self.inplace else None
        run_ninja(libraries(torch, cuda), Path(self.build_temp).resolve(), out_dir, database)
        say_what_was_built(cuda, reason)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class EmulatorBuild(Command):
    """`python setup.py build_emu`: the CUDA kernels as CPU ops, for the tests. It needs the toolkit's headers, no GPU."""

    description = "build the CUDA kernels for the emulator of the tests"
    user_options = [("variant=", None, "plain, race or asan")]  # noqa: RUF012 (setuptools' own way)

    def initialize_options(self) -> None:
        self.variant = "plain"

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        from tests.cuda_emulator.build import VARIANTS, emulated_ops

        if self.variant not in VARIANTS:
            fail(f"build_emu: --variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")
        cuda = find_cuda()
        if cuda is None:
            fail("build_emu: nvcc was not found; the emulator needs the headers of the CUDA toolkit (CUDA_HOME)")
            return
        torch = find_torch()
        all_variants = [emulated_ops(torch, cuda, variant) for variant in VARIANTS]  # they share objects
        target = ROOT / f"build/emu/{self.variant}/emu_ops.so"
        run_ninja(all_variants, target.parents[1], ROOT / "build", wanted=target)
        print(f"gptfast: built {target.relative_to(ROOT)}")


class ChecksBuild(Command):
    """`python setup.py build_checks`: the checks of the CPU kernels as a program, also for another machine than this one."""

    description = "build the checks of the CPU kernels"
    user_options = [("emulated", None, "with AVX-512's vectors in C++")]  # noqa: RUF012 (setuptools' own way)
    boolean_options = ["emulated"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.emulated = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        from tests.cpu_kernels.build import build_dir, checks

        wanted = checks(bool(self.emulated))
        run_ninja([wanted], build_dir(), ROOT / "build")
        print(f"gptfast: built build/{wanted.target}")


BUILD = os.environ.get("GPTFAST_BUILD", "1") != "0"
if (
    int(setuptools_version.split(".")[0]) < 77
):  # older ones refuse the licence in pyproject.toml, in ten lines of their own
    fail(f"setuptools {setuptools_version} is too old; gptfast needs >= 77: {BUILD_TOOLS}")
platform = wheel_platform()
WHEEL = {"py_limited_api": "cp310"} | ({"plat_name": platform} if platform else {})
setup(
    ext_modules=[Extension("gptfast._C", sources=[], py_limited_api=True)] if BUILD else [],
    cmdclass={"build_ext": NinjaBuild, "build_emu": EmulatorBuild, "build_checks": ChecksBuild} if BUILD else {},
    options={"bdist_wheel": WHEEL} if BUILD else {},
)
