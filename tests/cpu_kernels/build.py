"""The program that checks the CPU kernels: what `python setup.py build_checks` compiles, for any machine, without torch."""

from __future__ import annotations

from pathlib import Path

from buildtools.libraries import (
    CXX_FLAGS,
    QUIET,
    ROOT,
    base_flags,
    cpp_units,
    isa_flags,
    kernel_units,
    link_flags,
    plain_sources,
)
from buildtools.ninja_file import Library, Unit
from buildtools.toolchain import objects_folder, target

FOLDER = Path(__file__).parent


def name() -> str:
    return "-".join(target())


def build_dir() -> Path:
    """Where the objects are: those of the libraries where they are for this machine too."""
    return ROOT / objects_folder()


def isa_of(unit: Unit) -> str:
    """Of a kernel's unit; else "o"."""
    return unit.object.removesuffix(".o").rsplit(".", 1)[-1]


def emulated(unit: Unit, vectors: bool) -> Unit:
    """With AMX's tile registers in C++, so that its kernels run on every machine with AVX-512 BF16; `vectors`: with AVX-512's vectors
    too, on every machine with AVX2."""
    isa, dispatch = isa_of(unit), unit.source.name == "dispatch.cpp"
    flags = unit.flags
    if vectors and (isa.startswith("avx512") or isa == "amx"):
        macros = [flag for flag in flags if flag.startswith("-D")]
        bf16 = [] if isa == "avx512" else ["-DGPTFAST_EMULATED_BF16"]
        flags = [
            *CXX_FLAGS,
            *isa_flags("avx2"),
            *QUIET,
            "-O1",
            "-Wno-psabi",
            *macros,
            *bf16,
            "-include",
            str(FOLDER / "emulated_avx512.h"),
        ]
    if vectors and dispatch:
        flags = [*flags, "-DGPTFAST_EMULATED_AVX512"]
    if isa == "amx" or dispatch:
        flags = [*flags, "-include", str(FOLDER / "emulated_tiles.h")]
    if flags is unit.flags:
        return unit
    return Unit(unit.source, flags, f"checks/emulated{'_vectors' if vectors else ''}/{unit.object}")


def checks(vectors: bool = False) -> Library:
    """The program for the machine that CXX compiles for."""
    units = kernel_units("cpu") + kernel_units("engine")
    units += cpp_units("_ops", plain_sources("cpu")) + cpp_units("_C", plain_sources("engine"))
    units = [emulated(unit, vectors) for unit in units]
    flags = [*CXX_FLAGS, "-O1", "-Wno-missing-field-initializers", *base_flags()]  # the loops in double are few
    units += [Unit(path, flags, f"checks/{path.stem}.o") for path in sorted(FOLDER.glob("*.cpp"))]
    static = ["-static"] if target()[1] == "linux" else []  # so that qemu needs no libraries of the other machine
    program = "checks-emulated" if vectors else "checks"
    return Library(f"checks/{name()}/{program}", units, ["-pthread", *static, *link_flags()], program=True)
