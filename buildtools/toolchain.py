"""What the build needs and where it is: torch's headers, the CUDA toolkit; and how the build fails."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

TORCH_TARGET = (2, 11)
CUDA_ARCHS = "8.0;9.0+PTX"
BLACKWELL = (
    "10.0;12.0+PTX"  # too, from nvcc 12.8 on; GPUs without code of theirs compile the PTX when they first run it
)
OLDEST_GPU = 8.0
TORCH_HEADER = "include/torch/csrc/stable/library.h"

NO_TORCH = """
gptfast's compiled ops need the headers of PyTorch >= 2.11, and no torch was found in {places}.
Install PyTorch first, then gptfast:

    pip install torch --index-url https://download.pytorch.org/whl/cpu     # or, with CUDA: pip install torch
    pip install "setuptools>=77" ninja
    pip install --no-build-isolation .

GPTFAST_BUILD=0 pip install .  installs pure Python instead (every op runs in eager PyTorch).
"""
BUILD_TOOLS = 'pip install "setuptools>=77" ninja'


def fail(message: str) -> None:
    sys.exit(f"\ngptfast: {message.strip()}\n")


def is_zig() -> bool:
    """Whether CXX is `python -m ziglang c++ …` or `zig c++ …`, as for the wheels that are released."""
    return re.search(r"(ziglang|\bzig) +c\+\+", os.environ.get("CXX", "")) is not None


def is_gcc() -> bool:
    """Whether CXX is g++, by its name, which on macOS is clang's too; perhaps behind ccache."""
    command = os.environ.get("CXX", "g++")
    return re.search(r"(^|[ /-])g\+\+(-\d+)?$", command) is not None and target()[1] == "linux"


def this_machine() -> tuple[str, str]:
    """Processor and system, such as ("x86_64", "linux") and ("aarch64", "macos")."""
    machine, system = platform.machine().lower(), platform.system().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine), {"darwin": "macos"}.get(system, system)


def target() -> tuple[str, str]:
    """The machine and the system that CXX compiles for: those of `-target aarch64-macos` or of its name, else these here."""
    command = os.environ.get("CXX", "")
    match = re.search(r"-target[ =](\w+)-(linux|macos|windows)", command) or re.search(
        r"\b(x86_64|aarch64)-(linux)-gnu-g\+\+", command
    )
    return (match[1], match[2]) if match else this_machine()


def is_cross() -> bool:
    """Whether CXX compiles for another machine or system than this one."""
    return target() != this_machine()


def objects_folder() -> str:
    """Where objects are, below the sources: those for other machines beside each other."""
    return f"build/checks/{'-'.join(target())}/objects" if is_cross() else "build/objects"


MACOS = "14.0"  # the oldest that torch >= 2.11 has wheels for


def wheel_platform() -> str | None:
    """The platform that a cross-built wheel names; None: setuptools' own, that of this machine."""
    machine, system = target()
    if not is_cross() or system != "macos":
        return None  # auditwheel names those of Linux
    version = re.search(r"-macos[.](\d+)[.](\d+)", os.environ["CXX"])
    oldest = "_".join(version.groups()) if version else MACOS.replace(".", "_")
    return f"macosx_{oldest}_{'arm64' if machine == 'aarch64' else machine}"


def find_torch() -> Path:
    """torch's folder: GPTFAST_TORCH, for a cross build; else in the environment that gptfast is installed into.

    An isolated build finds that environment too."""
    named = os.environ.get("GPTFAST_TORCH")
    if named:
        if not (Path(named) / TORCH_HEADER).exists():
            fail(f"GPTFAST_TORCH is {named!r}; expected the folder torch of an unpacked wheel, with {TORCH_HEADER}")
        return Path(named).resolve()
    places = [Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")]
    places += [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    for place in dict.fromkeys(places):
        if (place / "torch" / TORCH_HEADER).exists():
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


def default_archs(nvcc_release: str) -> str:
    """What is built where TORCH_CUDA_ARCH_LIST names nothing: code for all GPUs that this nvcc, such as "13.0", knows."""
    newest = tuple(int(n) for n in nvcc_release.split(".")[:2]) >= (12, 8)
    return f"{CUDA_ARCHS};{BLACKWELL}" if newest else CUDA_ARCHS


def cuda_archs(nvcc_release: str) -> tuple[list[str], list[str]]:
    """What TORCH_CUDA_ARCH_LIST asks for, as "8.0" for code and "9.0+PTX" for PTX; and what of it is left out.

    There 9.0+PTX means both, as for torch's own extensions. Code for 9.0 is always that of 9.0a: without the "a" the Hopper
    kernels have no body, and a library with both would leave the choice to the driver.
    """
    archs: list[str] = []
    left_out: list[str] = []
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,\t\n") or default_archs(nvcc_release)
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
    return Cuda(nvcc, home, release[1], *cuda_archs(release[1]))


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
