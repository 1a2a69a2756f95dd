"""macOS and Windows, for which zig compiles here: the torch-free sources, and a wheel for macOS whose symbols are all somewhere.

Nothing of it runs here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT, macho

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not run from the source tree")
MACOS = "aarch64-macos.14.0"
TORCH = ROOT / "build/torch-macos/torch"  # `make torch-macos`
# What of the engine and the kernels asks the system, or the CPU, for anything.
SOURCES = ["cpu/amx.cpp", "cpu/dispatch.cpp", "cpu/scratch.cpp", "engine/cache.cpp", "engine/engine.cpp"]


def zig() -> list[str]:
    """The command that starts zig, of PyPI's ziglang or installed otherwise."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang"]
    if shutil.which("zig"):
        return ["zig"]
    pytest.skip("no zig (pip install --group wheel)")


@pytest.mark.parametrize("target", [MACOS, "x86_64-macos.14.0", "x86_64-windows-gnu"])
def test_sources_compile(target, tmp_path, monkeypatch):
    """Without a warning of clang; of the kernels one, for the widest instruction set. All in two runs of the compiler."""
    sys.path.insert(0, str(ROOT))
    from buildtools import libraries

    compiler = [*zig(), "c++", "-target", target]
    monkeypatch.setenv("CXX", shlex.join(compiler))
    isa = "neon_bf16" if "aarch64" in target else "avx512_bf16"
    assert isa in libraries.isas()
    flags = [f for f in libraries.CXX_FLAGS if f not in ("-O3", "-fPIC")]
    together = tmp_path / "together.cpp"
    together.write_text("".join(f'#include "{ROOT}/csrc/{source}"\n' for source in SOURCES))
    kernel = [*libraries.isa_flags(isa), f"-DGPTFAST_ISA=isa_{isa}", "-DGPTFAST_KERNEL=gelu_fwd"]
    for own, source in ((libraries.base_flags(), together), (kernel, ROOT / "csrc/cpu/kernel_unit.cpp")):
        made = tmp_path / f"{source.stem}.o"
        command = [*compiler, *flags, *own, "-O0", "-Werror", "-c", str(source), "-o", str(made)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and made.stat().st_size > 1000, result.stderr[-3000:]


def test_one_file_knows_the_system():
    """Memory of the system, forks and its page size are behind cpu/system.h; signals in python/mapping.cpp are POSIX's."""
    headers = re.compile(r"#include <(sys/mman|unistd|pthread|sched|windows|malloc|process)\.h>")
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp")]
    knowing = {p.relative_to(ROOT / "csrc").as_posix() for p in sources if headers.search(p.read_text())}
    assert knowing == {"cpu/system.h", "cpu/amx.cpp"}  # amx.cpp: a call of Linux alone


@pytest.fixture(scope="module")
def macos_wheel(tmp_path_factory) -> Path:
    """The wheel for macOS on arm64, unpacked."""
    compiler = [*zig(), "c++", "-target", MACOS]
    if not TORCH.exists():
        pytest.skip(f"no torch for macOS in {TORCH.relative_to(ROOT)} (make torch-macos: 111 MB)")
    folder = tmp_path_factory.mktemp("macos")
    env = {**os.environ, "CXX": shlex.join(compiler), "GPTFAST_CUDA": "0", "GPTFAST_TORCH": str(TORCH)}
    build = ["bdist_wheel", f"--bdist-dir={folder / 'bdist'}", f"--dist-dir={folder}"]
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={folder / 'base'}", *build]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-cp310-abi3-macosx_14_0_arm64.whl")
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked/gptfast"


def system_exports() -> set[str]:
    """What zig knows of macOS's libSystem."""
    place = subprocess.run([*zig(), "env"], capture_output=True, text=True, check=True).stdout
    found = re.search(r'lib_dir\W+"([^"]+)"', place)
    assert found, place
    return set(re.findall(r"[\w$.]+", (Path(found[1]) / "libc/darwin/libSystem.tbd").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_ops.so", "_C.abi3.so"])
def test_every_symbol_of_the_macos_wheel_is_somewhere(name, macos_wheel):
    """Each undefined symbol names the library that has it: torch's in torch's wheel, the system's, Python's in the program."""
    library = macho.read(macos_wheel / name)
    assert (library.machine, library.kind, library.oldest) == (macho.ARM64, macho.DYLIB, (14, 0))
    assert library.signed  # arm64 starts nothing else
    assert library.name == f"@rpath/{name}" and not [x for x in library.loads if str(ROOT) in x]
    system, torch = system_exports(), {}
    counted = dict.fromkeys(("torch", "system", "python"), 0)
    assert library.undefined and library.undefined <= library.bound.keys()
    for symbol, ordinal in library.bound.items():
        if ordinal == macho.DYNAMIC_LOOKUP:
            assert symbol.startswith("_Py") or symbol.startswith("__Py"), symbol
            assert hasattr(ctypes.pythonapi, symbol[1:]), symbol
            counted["python"] += 1
            continue
        source = library.loads[ordinal - 1]
        if source.startswith("/usr/lib/libSystem"):
            assert symbol in system, symbol
            counted["system"] += 1
            continue
        assert source.startswith("@rpath/"), f"{symbol} of {source}"
        path = TORCH / "lib" / source.removeprefix("@rpath/")
        torch[path] = torch.get(path) or macho.read(path)
        assert torch[path].has(symbol), f"{symbol} is not in {path.name}"
        counted["torch"] += 1
    if name == "_ops.so":
        assert "@loader_path/../torch/lib" in library.searched
        assert counted["torch"] > 20 and counted["system"] > 20 and not counted["python"]
    else:
        assert counted["python"] > 30 and counted["system"] > 20 and not counted["torch"]
    for path, needed in torch.items():
        assert not needed.has("_gptfast_no_such_symbol"), path
