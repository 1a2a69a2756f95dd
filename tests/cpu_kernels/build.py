"""The program that checks the CPU kernels: what `python setup.py build_checks` compiles, for any machine, without torch."""

from __future__ import annotations

from pathlib import Path

from buildtools.libraries import (
    CXX_FLAGS,
    ROOT,
    base_flags,
    cpp_units,
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


def emulated(unit: Unit) -> Unit:
    """With AMX's tile registers in C++, so that its kernels run on every machine with AVX-512 BF16."""
    flags = [*unit.flags, "-include", str(FOLDER / "emulated_tiles.h")]
    return Unit(unit.source, flags, f"checks/emulated/{unit.object}")


def checks() -> Library:
    """The program for the machine that CXX compiles for."""
    units = kernel_units("cpu") + kernel_units("engine")
    units += cpp_units("_ops", plain_sources("cpu")) + cpp_units("_C", plain_sources("engine"))
    units = [
        emulated(unit) if ".amx.o" in unit.object or unit.source.name == "dispatch.cpp" else unit for unit in units
    ]
    flags = [*CXX_FLAGS, "-O1", "-Wno-missing-field-initializers", *base_flags()]  # the loops in double are few
    units += [Unit(path, flags, f"checks/{path.stem}.o") for path in sorted(FOLDER.glob("*.cpp"))]
    static = ["-static"] if target()[1] == "linux" else []  # so that qemu needs no libraries of the other machine
    return Library(f"checks/{name()}/checks", units, ["-pthread", *static, *link_flags()], program=True)
