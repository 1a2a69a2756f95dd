"""The shared objects: their sources, and the flags of each."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from buildtools.ninja_file import Library, Unit
from buildtools.toolchain import TORCH_TARGET, Cuda, fail, is_gcc, is_zig, target, torch_version

ROOT = Path(__file__).resolve().parents[1]

# -ffp-contract: products and sums may fuse. No -ffast-math, and never -march=native: what runs is chosen at load time.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-unused-parameter", "-DNDEBUG"),
]
# Kernels get the flags of their instruction set. g++ 12 warns about its own AVX-512 headers and about vectors filled lane
# by lane. Of the scalar kernels only the compile time matters.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
WIDE = ["-mprefer-vector-width=512", *QUIET]
# Before registers are given out, g++ moves loads so far ahead that tiles of 24 sums are spilled; these processors reorder.
NEON = ["-fno-schedule-insns", *QUIET]
GNU_ONLY = {"-fno-schedule-insns", *QUIET}  # clang warns of these
ISA_FLAGS = {
    "scalar": ["-O1", "-DGPTFAST_SCALAR", *QUIET],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "avx512": ["-march=skylake-avx512", *WIDE],
    "avx512_bf16": ["-march=cooperlake", "-mtune=znver3", *WIDE],
    "amx": ["-march=cooperlake", "-mtune=znver3", "-DGPTFAST_TILES", *WIDE],  # its instructions are written out
    "neon": [*NEON],  # what every ARMv8-A processor has
    "neon_dotprod": ["-march=armv8.2-a+dotprod", *NEON],
    "neon_bf16": ["-march=armv8.2-a+dotprod+bf16+i8mm", *NEON],
}
# Zig's clang names processors in its own way, and takes those of this machine where none is named.
ZIG_BASE = {"x86_64": "-mcpu=x86_64", "aarch64": "-mcpu=generic"}
ZIG_ISA_FLAGS = {
    "scalar": ["-O1", "-DGPTFAST_SCALAR"],
    "avx2": ["-mcpu=haswell"],
    "avx512": ["-mcpu=skylake_avx512", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-mcpu=cooperlake", "-mprefer-vector-width=512"],
    "amx": ["-mcpu=cooperlake+amx_tile+amx_bf16+amx_int8", "-mprefer-vector-width=512", "-DGPTFAST_TILES"],
    "neon": [],
    "neon_dotprod": ["-mcpu=generic+dotprod"],
    "neon_bf16": ["-mcpu=generic+dotprod+bf16+i8mm"],
}
# Passes that g++ spends time on and that leave the hot loops of these kernels as they are (docs/developing.md).
KERNEL_FLAGS = {
    **dict.fromkeys(("causal_attention_fwd", "causal_attention_bwd"), "-fno-unswitch-loops"),
    **dict.fromkeys(("product_float", "product_bytes", "product_small", "product_mxfp4"), "-O2"),
    **dict.fromkeys(("attention", "page_scores", "page_values"), "-O2"),
}
VECTORS = {"amx": "avx512_bf16"}  # whose vectors an instruction set has, and whose flags but for its own macro
SELECT = "csrc/cpu/isa_select.h"
NVCC_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def listed(header: str, macro: str, condition: str = "") -> list[str]:
    """The names in a list of macros, such as `#define GPTFAST_ISAS(X, PART) X(scalar) X(neon) PART(neon_dotprod, neon)`: the first
    list after `condition`."""
    text = (ROOT / header).read_text(encoding="utf-8").replace("\\\n", " ")
    match = re.search(rf"{re.escape(condition)}\n?#define {macro}\(X(?:, PART)?\)(.*)", text)
    if not match:
        fail(f"{header} does not define {macro}")
        return []
    return re.findall(r"(?:X|PART)\((\w+)", match[1])


def isas() -> list[str]:
    """The instruction sets that kernels are compiled for: those of the machine that the compiler compiles for."""
    machine, _ = target()
    if machine not in ("x86_64", "aarch64"):
        return ["scalar"]
    return listed(SELECT, "GPTFAST_ISAS", f"if defined(__{machine}__)")


def isa_flags(isa: str) -> list[str]:
    """The flags of the kernels of an instruction set."""
    if not is_zig():
        return [flag for flag in ISA_FLAGS[isa] if target()[1] != "macos" or flag not in GNU_ONLY]
    flags = ZIG_ISA_FLAGS[isa]
    return flags if any(flag.startswith("-mcpu") for flag in flags) else [*base_flags(), *flags]


def base_flags() -> list[str]:
    """The flags of code that runs on every machine."""
    machine, _ = target()
    return [ZIG_BASE[machine]] if is_zig() and machine in ZIG_BASE else []


def link_flags() -> list[str]:
    """Of every library: zig keeps all that debuggers want, ten times the code, unless told not to."""
    return ["-s"] if is_zig() else []


def kernels_of(folder: str, isa: str) -> list[str]:
    """The kernels of csrc/`folder` that an instruction set has of its own."""
    part = f"GPTFAST_{folder.upper()}_{isa}"  # of one that has the others of another
    if f"#define {part}(X)" in (ROOT / SELECT).read_text(encoding="utf-8"):
        return listed(SELECT, part)
    return listed(f"csrc/{folder}/kernels.h", f"GPTFAST_{folder.upper()}_KERNELS")


def kernel_units(folder: str, only: Sequence[str] = ()) -> list[Unit]:
    """kernel_unit.cpp of csrc/`folder`, once for each kernel (of those named) and instruction set that has one of its own."""
    units = []
    for isa in isas():
        vectors = VECTORS.get(isa, isa)
        shared = [*CXX_FLAGS, *isa_flags(vectors), f"-DGPTFAST_VECTORS=isa_{vectors}"]
        prelude = ROOT / "csrc/cpu/kernel_prelude.h"  # a third of what small units take
        read = Unit(prelude, [*shared, "-x", "c++-header"], f"csrc/cpu/kernel_prelude.{vectors}.h.gch")
        flags = [*CXX_FLAGS, *isa_flags(isa), f"-DGPTFAST_VECTORS=isa_{vectors}", f"-DGPTFAST_ISA=isa_{isa}"]
        for kernel in kernels_of(folder, isa):
            if only and kernel not in only:
                continue
            source, object = ROOT / f"csrc/{folder}/kernel_unit.cpp", f"csrc/{folder}/{kernel}.{isa}.o"
            own = [*flags, f"-DGPTFAST_KERNEL={kernel}"]
            if is_gcc() and isa != "scalar" and kernel in KERNEL_FLAGS:
                own.append(KERNEL_FLAGS[kernel])
            units.append(Unit(source, own, object, header=read if is_gcc() else None))
    return units


def cpp_units(library: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> list[Unit]:
    """Sources that the library `library` has for itself."""
    return [
        Unit(path, [*CXX_FLAGS, *base_flags(), *flags], f"{library}/{path.relative_to(ROOT).with_suffix('.o')}")
        for path in sources
    ]


def plain_sources(folder: str) -> list[Path]:
    return [p for p in sorted((ROOT / "csrc" / folder).glob("*.cpp")) if p.name != "kernel_unit.cpp"]


def stable_abi(torch: Path) -> list[str]:
    major, minor = TORCH_TARGET
    target = f"-DTORCH_TARGET_VERSION=(((0ULL + {major}) << 56) | ((0ULL + {minor}) << 48))"
    return ["-isystem", str(torch / "include"), target]


def torch_link(torch: Path) -> list[str]:
    return [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]  # loaded before any of our libraries: no rpath


def macos_link(name: str, *flags: str) -> list[str]:
    """On macOS a library has a name, which must not be its place in the build, and says what it leaves to others."""
    return [f"-Wl,-install_name,@rpath/{name}", *flags] if target()[1] == "macos" else []


def bindings(*, cuda: bool) -> list[Path]:
    return [p for p in plain_sources("bindings") if p.name.startswith("cuda_") == cuda]


def cpu_ops(torch: Path) -> Library:
    units = kernel_units("cpu")
    units += cpp_units("_ops", plain_sources("cpu"))
    units += cpp_units("_ops", bindings(cuda=False), stable_abi(torch))
    beside = macos_link("_ops.so", "-Wl,-rpath,@loader_path/../torch/lib")  # where pip puts torch
    return Library("gptfast/_ops.so", units, [*torch_link(torch), *beside, *link_flags()])


def cuda_ops(torch: Path, cuda: Cuda) -> Library:
    flags = [*NVCC_FLAGS, *cuda.arch_flags()]
    units = [
        Unit(path, flags, f"_cuda_ops/csrc/cuda/{path.stem}.o", nvcc=cuda.nvcc)
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ]
    units += cpp_units("_cuda_ops", bindings(cuda=True), [*stable_abi(torch), f"-I{cuda.home / 'include'}"])
    places = [p for p in (cuda.home / "lib64", cuda.home / "lib") if p.exists()]
    static = any((p / "libcudart_static.a").exists() for p in places)
    runtime = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"] if static else ["-lcudart"]
    # libtorch.so has no code, so linkers drop it; but it alone leads to libtorch_cuda.so, which torch loads privately.
    whole_torch = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    link = [*torch_link(torch), *whole_torch, *(f"-L{p}" for p in places), *runtime]
    return Library("gptfast/_cuda_ops.so", units, link)


LIMITED_API = "0x030A0000"  # Python 3.10: one module for it and all newer ones


def python_module(torch: Path, cuda: Cuda | None) -> Library:
    flags = ["-isystem", sysconfig.get_paths()["include"], f"-DPy_LIMITED_API={LIMITED_API}"]
    told = [  # what module.cpp alone reads: the others are not compiled again where it changes
        f'-DGPTFAST_TORCH_TARGET="{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"',
        f'-DGPTFAST_TORCH_HEADERS="{torch_version(torch)}"',
    ]
    told += [f'-DGPTFAST_CUDA="{cuda.describe()}"'] if cuda else []
    units = kernel_units("engine")
    units += kernel_units("cpu", ["sample"])  # the objects of _ops.so
    units += cpp_units(
        "_C", [*plain_sources("engine"), *(ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("amx", "scratch"))]
    )
    for source in plain_sources("python"):
        units += cpp_units("_C", [source], [*flags, *(told if source.name == "module.cpp" else [])])
    python = macos_link("_C.abi3.so", "-Wl,-undefined,dynamic_lookup")  # Python's functions are in the program
    return Library("gptfast/_C.abi3.so", units, ["-pthread", *python, *link_flags()])


def libraries(torch: Path, cuda: Cuda | None) -> list[Library]:
    """Everything that is compiled and installed."""
    return [cpu_ops(torch), python_module(torch, cuda)] + ([cuda_ops(torch, cuda)] if cuda else [])
