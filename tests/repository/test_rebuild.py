"""A rebuild compiles only what changed, in place and by pip; compile_commands.json lists what is compiled."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gptfast

ROOT = Path(gptfast.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists() or shutil.which("g++") is None, reason="not run from the source tree, or no g++"
)
ISAS = ["scalar", "avx2", "avx512", "avx512_bf16"]
# Stands for g++: notes what it is asked for, and tells ninja which headers of ours a kernel or its prelude reads.
COMPILER = """#!/bin/sh
compiles= kernel= kept= before=
for word in "$@"; do
  case $before in -o) out=$word ;; -MF) depends=$word ;; -c) source=$word ;; esac
  case $word in -c) compiles=1 ;; -DGPTFAST_VECTORS=*) kernel=1 ;; esac
  case $word in -D* | -std*) kept="$kept $word" ;; esac
  before=$word
done
: >"$out"
[ "$compiles" ] || exit 0
echo "${{out#{tree}/build/objects/}}" >>"{log}"
[ "$kernel" ] && exec g++ $kept -DGPTFAST_SCALAR -MM -MT "$out" -MF "$depends" "$source"
echo "$out:" >"$depends"
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads, and compiled(*command): the objects that a command compiles."""
    copy, log = tmp_path / "tree", tmp_path / "log"
    for name in ("csrc", "buildtools", "gptfast"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER.format(log=log, tree=copy))
    compiler.chmod(0o755)

    def compiled(*command: str) -> list[str]:
        log.write_text("")
        environment = {**os.environ, "CXX": str(compiler), "GPTFAST_CUDA": "0"}
        result = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return sorted(log.read_text().split())

    return copy, compiled


IN_PLACE = ("setup.py", "-q", "build_ext", "--inplace")


@pytest.mark.slow
def test_an_edit_compiles_one_kernel_and_an_install_nothing_again(tree):
    copy, compiled = tree
    everything = compiled(*IN_PLACE)
    assert f"csrc/cpu/gelu_fwd.{ISAS[0]}.o" in everything and len(everything) > 60
    assert compiled(*IN_PLACE) == []
    listed = json.loads((copy / "compile_commands.json").read_text())
    assert {str(Path(entry["output"]).relative_to(copy / "build/objects")) for entry in listed} == set(everything)
    assert not [entry for entry in listed if "-include" in entry["command"]], "clangd cannot read what is precompiled"

    os.utime(copy / "csrc/cpu/gelu_fwd-inl.h")
    assert compiled(*IN_PLACE) == sorted(
        f"csrc/cpu/gelu_fwd.{isa}.o" for isa in ISAS if f"csrc/cpu/gelu_fwd.{isa}.o" in everything
    )
    os.utime(copy / "csrc/cpu/simd.h")
    again = set(compiled(*IN_PLACE))
    assert again == {o for o in everything if o.startswith("csrc/")} and "csrc/cpu/kernel_prelude.scalar.h.gch" in again

    # pip calls these two, each with a temporary folder for objects
    for hook in ("build_wheel", "build_editable"):
        code = f"from setuptools.build_meta import {hook}; {hook}('dist')"
        (copy / "dist").mkdir(exist_ok=True)
        assert compiled("-c", code) == [], hook


@pytest.mark.parametrize(
    ("compiler", "precompiled"),
    [
        ("g++", True),
        ("ccache /usr/bin/g++-12", True),
        ("aarch64-linux-gnu-g++", True),
        ("clang++", False),
        ("python -m ziglang c++ -target aarch64-macos", False),
    ],
)
def test_headers_are_precompiled_where_the_compiler_is_gcc(compiler, precompiled, monkeypatch):
    libraries = buildtools_libraries()
    monkeypatch.setenv("CXX", compiler)
    units = libraries.kernel_units("cpu", ["gelu_fwd"])
    assert units and all((unit.header is not None) is precompiled for unit in units)


def buildtools_libraries():
    sys.path.insert(0, str(ROOT))
    try:
        from buildtools import libraries
    finally:
        sys.path.remove(str(ROOT))
    return libraries


def test_every_kernel_is_listed_once():
    """In kernels.h, which dispatch.cpp and the build read; every -inl.h with a fill() is such a kernel."""
    listed = buildtools_libraries().listed
    for folder, macro in (("cpu", "GPTFAST_CPU_KERNELS"), ("engine", "GPTFAST_ENGINE_KERNELS")):
        kernels = listed(f"csrc/{folder}/kernels.h", macro)
        kernels += sorted({*listed("csrc/cpu/isa_select.h", f"GPTFAST_{folder.upper()}_amx")} - {*kernels})
        files = (ROOT / "csrc" / folder).glob("*-inl.h")
        assert sorted(kernels) == sorted(
            p.name.removesuffix("-inl.h") for p in files if "static void fill(Kernels& k)" in p.read_text()
        )


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="avx512_bf16 is of x86-64")
@pytest.mark.parametrize("folder", ["cpu", "engine"])
def test_shared_kernels_have_no_use_for_bf16(folder, tmp_path):
    """What avx512_bf16 takes from avx512 has none of its instructions, compiled for it: its list in isa_select.h lacks no kernel."""
    libraries = buildtools_libraries()
    every = libraries.listed(f"csrc/{folder}/kernels.h", f"GPTFAST_{folder.upper()}_KERNELS")
    shared = {*every} - {*libraries.kernels_of(folder, "avx512_bf16")}
    assert shared and "rows" not in shared and "gelu_fwd" not in shared
    for kernel in sorted(shared):
        given = [*libraries.CXX_FLAGS, *libraries.ISA_FLAGS["avx512_bf16"], "-O1", "-DGPTFAST_ISA=isa_avx512_bf16"]
        given += [f"-DGPTFAST_KERNEL={kernel}", "-S", "-o", "-", str(ROOT / f"csrc/{folder}/kernel_unit.cpp")]
        text = subprocess.run(["g++", *given], check=True, capture_output=True, text=True).stdout
        assert "fill_" in text and not (found := re.search(r"\t(v\w*bf16\w*|vpdp\w+)\t", text)), (kernel, found)
