"""Libraries and their units as a build.ninja, and ninja's run over it."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from buildtools.toolchain import BUILD_TOOLS, fail


@dataclass
class Unit:
    """A source and how it is compiled. Libraries that name the same object share it."""

    source: Path
    flags: Sequence[str]
    object: str  # below the folder of the build
    nvcc: Path | None = None  # compiles it, if not the C++ compiler
    header: Unit | None = None  # a precompiled header (g++), whose object ends in .gch; it is included first


@dataclass
class Library:
    """A shared object, or a program: its units, and what it links."""

    target: str  # below the folder of the output
    units: list[Unit]
    link: list[str] = field(default_factory=list)
    program: bool = False


def shell(argument: str) -> str:
    """An argument for a ninja variable that /bin/sh will split."""
    return shlex.quote(argument).replace("$", "$$")


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


PRECOMPILED = "-fpch-preprocess"
RULE = """rule {name}
  command = ${name} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out"""


def write_ninja(libraries: list[Library], build_dir: Path, out_dir: Path) -> Path:
    """build.ninja in `build_dir`; it is touched only where it changes."""
    units = [unit for library in libraries for unit in library.units]
    units += [unit.header for unit in units if unit.header]
    nvcc = next((ninja_path(unit.nvcc) for unit in units if unit.nvcc), "nvcc")
    lines = [
        f"builddir = {ninja_path(build_dir)}",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"nvcc = {nvcc}",
        RULE.format(name="cxx"),
        RULE.format(name="nvcc"),
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
        "  description = link $out",
        "rule program",
        "  command = $cxx -o $out $in $flags",
        "  description = link $out",
    ]

    def object_of(unit: Unit) -> str:
        return ninja_path(build_dir / unit.object)

    for unit in {unit.object: unit for unit in units}.values():
        rule, flags = "nvcc" if unit.nvcc else "cxx", [*unit.flags]
        needs = ""
        if unit.header:
            flags += [PRECOMPILED, "-include", str(build_dir / unit.header.object).removesuffix(".gch")]
            needs = f" | {object_of(unit.header)}"
        lines.append(f"build {object_of(unit)}: {rule} {ninja_path(unit.source)}{needs}")
        lines.append(f"  flags = {' '.join(map(shell, flags))}")
    for library in libraries:
        objects = " ".join(map(object_of, library.units))
        rule = "program" if library.program else "link"
        lines.append(f"build {ninja_path(out_dir / library.target)}: {rule} {objects}")
        lines.append(f"  flags = {' '.join(map(shell, library.link))}")
    path = build_dir / "build.ninja"
    build_dir.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def ninja_command() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or fail(f"ninja was not found; the build needs it: {BUILD_TOOLS}") or ""


def free_memory() -> float:
    """Gigabytes that programs may still take; a large number where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) / 2**20 if found else 1e9


@contextmanager
def locked(build_dir: Path) -> Iterator[None]:
    """Two builds into one folder, as of two installs at once, run one after the other."""
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_ninja(
    libraries: list[Library],
    build_dir: Path,
    out_dir: Path,
    database: Path | None = None,
    wanted: Path | None = None,
) -> None:
    """Compile what is not up to date. `database`: where compile_commands.json goes. `wanted`: the only library to build."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        fail(
            "no C++ compiler (g++) was found. Install one (Debian: apt-get install g++), name it in CXX, "
            "or install pure Python with GPTFAST_BUILD=0."
        )
    # ccache keeps objects that were compiled with a precompiled header only where it is told that it may.
    environment = {"CCACHE_SLOPPINESS": "pch_defines,time_macros", **os.environ}
    each = 2.0 if any(unit.nvcc for library in libraries for unit in library.units) else 0.75  # gigabytes of a compiler
    jobs = os.environ.get("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, int(free_memory() / each)))))
    with locked(build_dir):
        command = [ninja_command(), "-f", str(write_ninja(libraries, build_dir, out_dir))]
        if database:
            told = subprocess.run([*command, "-t", "compdb", "cxx", "nvcc"], capture_output=True, check=False)
            aside = database.with_suffix(".tmp")
            header = rb"%b -include ('[^']*'|\S+)" % PRECOMPILED.encode()
            aside.write_bytes(re.sub(header, b"", told.stdout))  # clangd cannot read it
            aside.replace(database)
        result = subprocess.run(
            [*command, "-j", jobs, *([str(wanted)] if wanted else [])], env=environment, check=False
        )
    if result.returncode:
        fail("the compiler reported errors (above).")
