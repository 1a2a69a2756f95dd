"""The CUDA kernels as CPU ops: what `python setup.py build_emu` compiles, without a GPU."""

from __future__ import annotations

from pathlib import Path

from buildtools.libraries import CXX_FLAGS, QUIET, ROOT, bindings, stable_abi, torch_link
from buildtools.ninja_file import Library, Unit
from buildtools.toolchain import Cuda

EMULATOR = Path(__file__).parent
VARIANTS = {
    "plain": ["-O2"],
    "race": ["-O1", "-g1", "-DEMU_RACECHECK"],
    "asan": ["-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"],
}


def emulated_ops(torch: Path, cuda: Cuda, variant: str) -> Library:
    """The CUDA kernels and their bindings as a library of CPU ops, for the tests.

    A third of the time of a kernel goes into the emulator's headers, so that they are compiled once. The race checker watches
    kernels alone: its bindings are the objects of the plain build. Bindings run once a call, so that only their compile time matters.
    """
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    glue = [p for p in bindings(cuda=True) if p.name != "cuda_device.cpp"]
    quiet = ["-fno-strict-aliasing", "-Wno-unknown-pragmas", *QUIET]
    watched = [*quiet, *["-fsanitize=thread"] * (variant == "race")]

    def unit(source: Path, like: str, *own: str, suffix: str = ".o", header: Unit | None = None) -> Unit:
        flags = [*CXX_FLAGS, *VARIANTS[like], *own, *stable_abi(torch), f"-I{cuda.home / 'include'}", "-DGPTFAST_EMU"]
        return Unit(source, flags, f"{like}/emu_ops/{source.relative_to(ROOT).with_suffix(suffix)}", header=header)

    emulator = EMULATOR / "cuda_emulator.h"
    precompiled = unit(emulator, variant, "-x", "c++-header", *watched, suffix=".h.gch")
    units = [unit(p, variant, "-x", "c++", *watched, header=precompiled) for p in kernels]
    units += [unit(p, "plain" if variant == "race" else variant, "-O0") for p in glue]
    units += [unit(EMULATOR / "runtime.cpp", variant, "-include", str(emulator), *quiet)]
    units += [unit(EMULATOR / "racecheck.cpp", variant)] * (variant == "race")
    link = [*torch_link(torch), "-ldl", "-lpthread"] + ["-fsanitize=address"] * (variant == "asan")
    return Library(f"emu/{variant}/emu_ops.so", units, link)
