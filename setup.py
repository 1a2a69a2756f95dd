"""Builds the compiled part of gptfast: shared objects, by ninja, without importing torch.

    gptfast/_ops.so        every tensor op on the CPU, through the libtorch stable ABI: one binary for torch >= 2.11
    gptfast/_cuda_ops.so   the same ops on CUDA; loaded only where torch sees a GPU
    gptfast/_C.*.so        pybind11: build information and the inference engine (csrc/engine, without torch)

GPTFAST_BUILD=0 installs pure Python: every op then runs in eager PyTorch.
GPTFAST_CUDA=auto|1|0: build the CUDA ops where nvcc is found and torch is a CUDA build (auto), always, or never.
TORCH_CUDA_ARCH_LIST names the GPUs, as for torch's own extensions, such as "8.0;9.0+PTX" (the default). 9.0 is built as
9.0a, which has wgmma and TMA and runs on every GPU of capability 9.0; GPUs below 8.0 are left out.
MAX_JOBS bounds the number of compilers at work.

`python setup.py build_emu [--variant=race|asan]` builds build/emu/…/emu_ops.so for the tests: the CUDA kernels on the CPU.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools import __version__ as setuptools_version
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

NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "8.0;9.0+PTX"  # newer GPUs compile the PTX when they first run it
OLDEST_GPU = 8.0

NO_TORCH = """
gptfast's compiled ops need the headers of PyTorch >= 2.11, and no torch was found in {places}.
Install PyTorch first, then gptfast:

    pip install torch --index-url https://download.pytorch.org/whl/cpu     # or, with CUDA: pip install torch
    pip install "setuptools>=77" pybind11 ninja
    pip install --no-build-isolation .

GPTFAST_BUILD=0 pip install .  installs pure Python instead (every op runs in eager PyTorch).
"""
BUILD_TOOLS = 'pip install "setuptools>=77" pybind11 ninja'


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


def torch_cuda(torch: Path) -> str | None:
    """The CUDA version that torch was built with, or None for a CPU build."""
    match = re.search(r"^cuda[^=]*= '([^']+)'", (torch / "version.py").read_text(), re.M)
    return match.group(1) if match else None


@dataclass
class Cuda:
    """The CUDA toolkit, and what is compiled with it."""

    nvcc: Path
    home: Path
    version: str
    archs: list[str]  # "8.0", "9.0a", "9.0+PTX"
    left_out: list[str]  # of TORCH_CUDA_ARCH_LIST

    def describe(self) -> str:
        """Such as `sm_80, sm_90a, PTX 9.0; nvcc 13.0`."""
        names = [f"PTX {a[:-4]}" if a.endswith("+PTX") else f"sm_{a.replace('.', '')}" for a in self.archs]
        return f"{', '.join(names)}; nvcc {self.version}"

    def arch_flags(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            code = f"compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
        return flags


def cuda_archs() -> tuple[list[str], list[str]]:
    """What TORCH_CUDA_ARCH_LIST asks for, as "8.0" for code and "9.0+PTX" for PTX; and what of it is left out.

    There 9.0+PTX means both, as for torch's own extensions. Code for 9.0 is always that of 9.0a: without the "a" the Hopper
    kernels have no body, and a library with both would leave the choice to the driver.
    """
    archs: list[str] = []
    left_out: list[str] = []
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,\t\n") or CUDA_ARCHS
    for arch in re.split(r"[;,\s]+", asked):
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", arch)
        if not match:
            fail(f"TORCH_CUDA_ARCH_LIST names {arch!r}; expected a list such as {CUDA_ARCHS!r}")
            continue
        number, feature, ptx = match.groups()
        if float(number) < OLDEST_GPU:
            left_out.append(arch)
            continue
        archs.append("9.0a" if number == "9.0" else number + feature)
        archs += [arch] if ptx else []
    if not archs:
        fail(
            f"TORCH_CUDA_ARCH_LIST names {', '.join(left_out)}; gptfast's CUDA kernels need {OLDEST_GPU} or newer, or build "
            "with GPTFAST_CUDA=0"
        )
    return list(dict.fromkeys(archs)), list(dict.fromkeys(left_out))


def find_nvcc() -> Path | None:
    """In CUDA_HOME, if that is set; else on the path, or where the toolkit installs itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    found = found or (None if home else shutil.which("nvcc", path="/usr/local/cuda/bin"))
    return Path(found) if found else None


def find_cuda() -> Cuda | None:
    """The toolkit, wherever nvcc says that it lives (it may be a script in some other folder)."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    said = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    )
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    top, release = re.search(r"_HERE_=(.+)", said.stderr), re.search(r"release ([\d.]+)", version)
    if not top or not release:
        fail(f"{nvcc} does not run: {said.stderr or version}")
    home = Path(top[1].strip()).parent
    return Cuda(nvcc, home, release[1], *cuda_archs())


def wanted_cuda(torch: Path) -> tuple[Cuda | None, str]:
    """What GPTFAST_CUDA asks for: the toolkit, or None and the reason."""
    choice = os.environ.get("GPTFAST_CUDA", "auto") or "auto"
    if choice not in ("auto", "0", "1"):
        fail(f"GPTFAST_CUDA is {choice!r}; expected auto, 0 or 1")
    if choice == "0":
        return None, "GPTFAST_CUDA=0"
    if choice == "auto" and not torch_cuda(torch):
        return None, "this torch is a CPU build"
    cuda = find_cuda()
    if cuda is None and choice == "1":
        fail(
            "GPTFAST_CUDA=1, but nvcc was not found. Install the CUDA toolkit, name its folder in CUDA_HOME, or build "
            "without the CUDA ops: GPTFAST_CUDA=0"
        )
    return cuda, "nvcc was not found"


@dataclass
class Library:
    """One shared object: its sources, flags, and what it links."""

    target: str
    sources: list[Path]
    flags: list[str]
    link: list[str] = field(default_factory=list)
    flags_of: Callable[[Path], list[str]] = lambda source: []  # further flags of one source
    cuda: Cuda | None = None  # compiles the .cu files; without it they are C++


def stable_abi(torch: Path) -> list[str]:
    major, minor = TORCH_TARGET
    target = f"-DTORCH_TARGET_VERSION=(((0ULL + {major}) << 56) | ((0ULL + {minor}) << 48))"
    return ["-isystem", str(torch / "include"), target]


def torch_link(torch: Path) -> list[str]:
    return [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]  # loaded before any of our libraries: no rpath


def bindings(*, cuda: bool) -> list[Path]:
    return [p for p in sorted((ROOT / "csrc/bindings").glob("*.cpp")) if p.name.startswith("cuda_") == cuda]


def isa_flags(source: Path) -> list[str]:
    return ISA_FLAGS.get(source.stem, [])


def cpu_ops(torch: Path) -> Library:
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp")) + bindings(cuda=False)
    return Library("gptfast/_ops.so", sources, stable_abi(torch), torch_link(torch), isa_flags)


def cuda_ops(torch: Path, cuda: Cuda) -> Library:
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) + bindings(cuda=True)
    places = [p for p in (cuda.home / "lib64", cuda.home / "lib") if p.exists()]
    static = any((p / "libcudart_static.a").exists() for p in places)
    runtime = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"] if static else ["-lcudart"]
    # libtorch.so has no code, so linkers drop it; but it alone leads to libtorch_cuda.so, which torch loads privately.
    whole_torch = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    link = [*torch_link(torch), *whole_torch, *(f"-L{p}" for p in places), *runtime]
    return Library("gptfast/_cuda_ops.so", sources, [*stable_abi(torch), f"-I{cuda.home / 'include'}"], link, cuda=cuda)


EMULATOR = ROOT / "tests/cuda_emulator"
EMU_VARIANTS = {
    "plain": ["-O2"],
    "race": ["-O1", "-g", "-DEMU_RACECHECK"],
    "asan": ["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"],
}


def emulated_ops(torch: Path, cuda: Cuda, variant: str) -> Library:
    """The CUDA kernels and their glue as a library of CPU ops, for the tests."""
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
    flags = [*stable_abi(torch), f"-I{cuda.home / 'include'}", "-DGPTFAST_EMU", *EMU_VARIANTS[variant]]
    link = [*torch_link(torch), "-ldl", "-lpthread"] + ["-fsanitize=address"] * (variant == "asan")
    return Library(f"emu/{variant}/emu_ops.so", sources, flags, link, flags_of)


def python_module(torch: Path, cuda: Cuda | None) -> Library:
    try:
        import pybind11
    except ImportError:
        fail(f"pybind11 was not found; the build needs it: {BUILD_TOOLS}")

    include = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    defines = [
        f'-DGPTFAST_TORCH_TARGET="{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"',
        f'-DGPTFAST_TORCH_HEADERS="{torch_version(torch)}"',
    ]
    defines += [f'-DGPTFAST_CUDA="{cuda.describe()}"'] if cuda else []
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = sorted((ROOT / "csrc/engine").glob("*.cpp")) + sorted((ROOT / "csrc/python").glob("*.cpp"))
    return Library(f"gptfast/_C{suffix}", sources, include + defines, ["-pthread"], isa_flags)


def libraries(torch: Path, cuda: Cuda | None) -> list[Library]:
    """Everything that is compiled and installed."""
    return [cpu_ops(torch), python_module(torch, cuda)] + ([cuda_ops(torch, cuda)] if cuda else [])


def shell(argument: str) -> str:
    """An argument for a ninja variable that /bin/sh will split."""
    return shlex.quote(argument).replace("$", "$$")


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
        f"nvcc = {next((ninja_path(lib.cuda.nvcc) for lib in libs if lib.cuda), 'nvcc')}",
        "rule nvcc",
        "  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out",
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
            obj = ninja_path(build_dir / Path(lib.target).stem / source.relative_to(ROOT).with_suffix(".o"))
            rule, flags = "cxx", CXX_FLAGS + lib.flags_of(source) + lib.flags
            if lib.cuda and source.suffix == ".cu":
                rule, flags = "nvcc", NVCC_FLAGS + lib.cuda.arch_flags()
            lines += [f"build {obj}: {rule} {ninja_path(source)}", f"  flags = {' '.join(map(shell, flags))}"]
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
        return shutil.which("ninja") or fail(f"ninja was not found; the build needs it: {BUILD_TOOLS}") or ""


def free_memory() -> float:
    """Gigabytes that programs may still take; a large number where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) / 2**20 if found else 1e9


def run_ninja(libs: list[Library], build_dir: Path, out_dir: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        fail(
            "no C++ compiler (g++) was found. Install one (Debian: apt-get install g++), name it in CXX, "
            "or install pure Python with GPTFAST_BUILD=0."
        )
    each = 2.0 if any(lib.cuda for lib in libs) else 0.75  # gigabytes that a compiler may take
    jobs = max(1, min(os.cpu_count() or 1, int(free_memory() / each)))
    ninja_file = write_ninja(libs, build_dir, out_dir)
    jobs = os.environ.get("MAX_JOBS", str(jobs))
    result = subprocess.run([ninja_command(), "-f", str(ninja_file), "-j", jobs], check=False)
    if result.returncode:
        fail("the compiler reported errors (above).")


def say_what_was_built(cuda: Cuda | None, reason: str) -> None:
    if cuda and cuda.left_out:
        print(
            f"gptfast: TORCH_CUDA_ARCH_LIST names {', '.join(cuda.left_out)}: left out, the kernels need {OLDEST_GPU}"
        )
    what = f"the CUDA ops ({cuda.describe()})" if cuda else f"no CUDA ops: {reason}"
    print(f"gptfast: built the CPU ops (scalar, AVX2, AVX-512, AVX-512 BF16); {what}")


class NinjaBuild(build_ext):
    """`build_ext` that hands everything to ninja: per-file flags and incremental builds."""

    def run(self) -> None:
        out_dir = ROOT if self.inplace else Path(self.build_lib).resolve()
        (out_dir / "gptfast").mkdir(parents=True, exist_ok=True)
        torch = find_torch()
        cuda, reason = wanted_cuda(torch)
        run_ninja(libraries(torch, cuda), Path(self.build_temp).resolve(), out_dir)
        say_what_was_built(cuda, reason)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class EmulatorBuild(Command):
    """`python setup.py build_emu`: the CUDA kernels as CPU ops, for the tests. It needs the toolkit's headers, no GPU."""

    description = "build the CUDA kernels for the emulator of the tests"
    user_options = [("variant=", None, f"one of {', '.join(EMU_VARIANTS)}")]  # noqa: RUF012 (setuptools' own way)

    def initialize_options(self) -> None:
        self.variant = "plain"

    def finalize_options(self) -> None:
        if self.variant not in EMU_VARIANTS:
            fail(f"build_emu: --variant is {self.variant!r}; expected one of {', '.join(EMU_VARIANTS)}")

    def run(self) -> None:
        cuda = find_cuda()
        if cuda is None:
            fail("build_emu: nvcc was not found; the emulator needs the headers of the CUDA toolkit (CUDA_HOME)")
            return
        library = emulated_ops(find_torch(), cuda, self.variant)
        target = ROOT / "build" / library.target
        target.parent.mkdir(parents=True, exist_ok=True)
        run_ninja([library], target.parent, ROOT / "build")
        print(f"gptfast: built {target.relative_to(ROOT)}")


BUILD = os.environ.get("GPTFAST_BUILD", "1") != "0"
if (
    int(setuptools_version.split(".")[0]) < 77
):  # older ones refuse the licence in pyproject.toml, in ten lines of their own
    fail(f"setuptools {setuptools_version} is too old; gptfast needs >= 77: {BUILD_TOOLS}")
setup(
    ext_modules=[Extension("gptfast._C", sources=[])] if BUILD else [],
    cmdclass={"build_ext": NinjaBuild, "build_emu": EmulatorBuild} if BUILD else {},
)
