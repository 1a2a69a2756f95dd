"""Builds the compiled part of gptfast: two shared objects, by ninja, without importing torch.

    gptfast/_ops.so      every tensor op, through the libtorch stable ABI: one binary for torch >= 2.11
    gptfast/_C.*.so      pybind11: build information and the inference engine (csrc/engine, without torch)

GPTFAST_BUILD=0 installs pure Python: every op then runs in eager PyTorch.
MAX_JOBS bounds the number of compilers at work.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = (2, 11)

# -ffp-contract: products and sums may fuse. No -ffast-math, and never -march=native: what runs is chosen at load time.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter", "-DNDEBUG"),
]
# Per-ISA units get their own flags. g++ 12 warns about its own AVX-512 headers and about vectors filled lane by lane.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
WIDE = ["-mprefer-vector-width=512", *QUIET]
ISA_FLAGS = {
    "isa_scalar": QUIET,
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "isa_avx512": ["-march=skylake-avx512", *WIDE],
    "isa_avx512_bf16": ["-march=cooperlake", "-mtune=znver3", *WIDE],
}

NO_TORCH = """
gptfast's compiled ops need the headers of PyTorch >= 2.11, and no torch was found in {places}.
Install PyTorch first, then gptfast:

    pip install torch                 # or, for the CPU build: pip install torch --index-url <PyTorch's CPU index>
    pip install --no-build-isolation .

GPTFAST_BUILD=0 pip install .  installs pure Python instead (every op runs in eager PyTorch).
"""


def fail(message: str) -> None:
    sys.exit(f"\ngptfast: {message.strip()}\n")


def find_torch() -> Path:
    """torch's folder in the environment that gptfast is installed into (also from inside an isolated build)."""
    places = [Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")]
    places += [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    for place in dict.fromkeys(places):
        if (place / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return place / "torch"
    fail(NO_TORCH.format(places=", ".join(str(p) for p in dict.fromkeys(places))))
    raise AssertionError("unreachable")


def torch_version(torch: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    version = match.group(1) if match else "0"
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_TARGET:
        fail(f"torch {version} in {torch.parent} is too old; gptfast needs >= 2.11: pip install -U torch")
    return version


@dataclass
class Library:
    """One shared object: its sources, flags, and what it links."""

    target: str
    sources: list[Path]
    flags: list[str]
    link: list[str] = field(default_factory=list)


def cpu_ops(torch: Path) -> Library:
    major, minor = TORCH_TARGET
    include = ["-isystem", str(torch / "include")]
    defines = [f"-DTORCH_TARGET_VERSION=(((0ULL + {major}) << 56) | ((0ULL + {minor}) << 48))"]
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp")) + sorted((ROOT / "csrc/bindings").glob("*.cpp"))
    link = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]  # already loaded when _ops.so is: no rpath
    return Library("gptfast/_ops.so", sources, include + defines, link)


def python_module(torch: Path) -> Library:
    import pybind11

    include = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    defines = [
        f'-DGPTFAST_TORCH_TARGET=\\"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}\\"',
        f'-DGPTFAST_TORCH_HEADERS=\\"{torch_version(torch)}\\"',
    ]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = sorted((ROOT / "csrc/engine").glob("*.cpp")) + sorted((ROOT / "csrc/python").glob("*.cpp"))
    return Library(f"gptfast/_C{suffix}", sources, include + defines, ["-pthread"])


def libraries(torch: Path) -> list[Library]:
    """Everything that is compiled. The CUDA ops, a shared object of their own, are added to this list."""
    return [cpu_ops(torch), python_module(torch)]


def shell(argument: str) -> str:
    """An argument for a ninja variable that /bin/sh will split."""
    quoted = argument if re.fullmatch(r'[\w@%+=:,./\\"-]+', argument) else f"'{argument}'"
    return quoted.replace("$", "$$")


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(libs: list[Library], build_dir: Path, out_dir: Path) -> Path:
    lines = [
        f"builddir = {ninja_path(build_dir)}",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule cxx",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
        "  description = link $out",
    ]
    for lib in libs:
        objects = []
        for source in lib.sources:
            obj = ninja_path(build_dir / source.relative_to(ROOT).with_suffix(".o"))
            flags = CXX_FLAGS + ISA_FLAGS.get(source.stem, []) + lib.flags
            lines += [f"build {obj}: cxx {ninja_path(source)}", f"  flags = {' '.join(map(shell, flags))}"]
            objects.append(obj)
        lines.append(f"build {ninja_path(out_dir / lib.target)}: link {' '.join(objects)}")
        lines.append(f"  flags = {' '.join(map(shell, lib.link))}")
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
        return shutil.which("ninja") or fail("ninja was not found: pip install ninja") or ""


class NinjaBuild(build_ext):
    """`build_ext` that hands everything to ninja: per-file flags and incremental builds."""

    def run(self) -> None:
        if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
            fail(
                "no C++ compiler (g++) was found. Install one (Debian: apt-get install g++), name it in CXX, "
                "or install pure Python with GPTFAST_BUILD=0."
            )
        out_dir = ROOT if self.inplace else Path(self.build_lib).resolve()
        (out_dir / "gptfast").mkdir(parents=True, exist_ok=True)
        ninja_file = write_ninja(libraries(find_torch()), Path(self.build_temp).resolve(), out_dir)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        result = subprocess.run([ninja_command(), "-f", str(ninja_file), "-j", jobs], check=False)
        if result.returncode:
            fail("the compiler reported errors (above).")
        print("gptfast: built the CPU ops (scalar, AVX2, AVX-512, AVX-512 BF16); no CUDA ops in this version")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


BUILD = os.environ.get("GPTFAST_BUILD", "1") != "0"
setup(
    ext_modules=[Extension("gptfast._C", sources=[])] if BUILD else [],
    cmdclass={"build_ext": NinjaBuild} if BUILD else {},
)
