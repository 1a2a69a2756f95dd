"""The CUDA kernels as CPU ops: what `python setup.py build_emu` compiles, without a GPU."""

from __future__ import annotations

from pathlib import Path

from buildtools.libraries import CXX_FLAGS, QUIET, ROOT, bindings, stable_abi, torch_link
from buildtools.ninja_file import Library, Unit
from buildtools.toolchain import Cuda

EMULATOR = Path(__file__).parent
VARIANTS = {
    "plain": ["-O2"],
    "race": ["-O1", "-g", "-DEMU_RACECHECK"],
    "asan": ["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"],
}


def emulated_ops(torch: Path, cuda: Cuda, variant: str) -> Library:
    """The CUDA kernels and their bindings as a library of CPU ops, for the tests."""
    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    glue = [p for p in bindings(cuda=True) if p.name != "cuda_device.cpp"]
    emulator = ["-x", "c++", "-include", str(EMULATOR / "cuda_emulator.h"), "-fno-strict-aliasing"]
    emulator += ["-Wno-unknown-pragmas", *QUIET]

    def flags_of(source: Path) -> list[str]:
        if source in kernels or source.name == "runtime.cpp":
            watched = variant == "race" and source in kernels
            return emulator + (["-fsanitize=thread"] if watched else [])
        return []

    sources = [*kernels, *glue, EMULATOR / "runtime.cpp"] + [EMULATOR / "racecheck.cpp"] * (variant == "race")
    flags = [*stable_abi(torch), f"-I{cuda.home / 'include'}", "-DGPTFAST_EMU", *VARIANTS[variant]]
    units = [
        Unit(p, [*CXX_FLAGS, *flags_of(p), *flags], f"emu_ops/{p.relative_to(ROOT).with_suffix('.o')}") for p in sources
    ]
    link = [*torch_link(torch), "-ldl", "-lpthread"] + ["-fsanitize=address"] * (variant == "asan")
    return Library(f"emu/{variant}/emu_ops.so", units, link)
