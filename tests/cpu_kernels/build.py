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
    listed,
    plain_sources,
)
from buildtools.ninja_file import Library, Unit
from buildtools.toolchain import target, this_machine

FOLDER = Path(__file__).parent


def name() -> str:
    return "-".join(target())


def build_dir() -> Path:
    """Where the objects are: those of the libraries where they are for this machine too."""
    native = target() == this_machine()
    return ROOT / "build" / ("objects" if native else f"checks/{name()}/objects")


def checks() -> Library:
    """The program for the machine that CXX compiles for."""
    units = kernel_units("cpu", listed("csrc/cpu/kernels.h", "GPTFAST_CPU_KERNELS"))
    units += kernel_units("engine", listed("csrc/engine/kernels.h", "GPTFAST_ENGINE_KERNELS"))
    units += cpp_units("_ops", plain_sources("cpu")) + cpp_units("_C", plain_sources("engine"))
    flags = [*CXX_FLAGS, "-O1", "-Wno-missing-field-initializers", *base_flags()]  # the loops in double are few
    units += [Unit(path, flags, f"checks/{path.stem}.o") for path in sorted(FOLDER.glob("*.cpp"))]
    static = ["-static"] if target()[1] == "linux" else []  # so that qemu needs no libraries of the other machine
    return Library(f"checks/{name()}/checks", units, ["-pthread", *static, *link_flags()], program=True)
