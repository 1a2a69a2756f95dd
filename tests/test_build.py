"""What was compiled: wide instructions only where cpuid was asked, one OpenMP runtime, files that one can read."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import gptfast

PACKAGE = Path(gptfast.__file__).parent
ROOT = PACKAGE.parent
needs_ops = pytest.mark.skipif(not (PACKAGE / "_ops.so").exists(), reason="this install has no compiled ops")
needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
needs_tree = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not run from the source tree")


@needs_ops
@needs_objdump
@pytest.mark.parametrize("library", ["_ops.so", "_C.*.so"])
def test_wide_registers_only_in_their_units(library):
    """No AVX-512 or AVX code outside the functions of the units that were compiled for it."""
    (path,) = PACKAGE.glob(library)
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", path], capture_output=True, text=True, check=True
    ).stdout
    allowed = {"ymm": ("isa_avx2", "isa_avx512"), "zmm": ("isa_avx512",)}
    seen, function = set(), ""
    for line in text.splitlines():
        if line.endswith(">:"):
            function = line
        for register, units in allowed.items():
            if f"%{register}" in line:
                assert any(unit in function for unit in units), f"{register} in {function}: {line}"
                seen.add(register)
    assert seen == {"ymm", "zmm"}, "the check saw no wide code at all"


@needs_ops
def test_links_no_second_openmp_runtime():
    if shutil.which("readelf") is None:
        pytest.skip("binutils is not installed")
    text = subprocess.run(["readelf", "-d", PACKAGE / "_ops.so"], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", text)
    assert not [n for n in needed if "gomp" in n or "iomp" in n or "torch_python" in n], needed


@needs_ops
def test_build_info():
    from gptfast import _C

    info = _C.build_info()
    assert info["torch_target"] == "2.11"
    assert info["torch_headers"].split("+")[0].count(".") >= 1
    assert info["cuda"] is False
    assert torch.ops.gptfast.cpu_isas().split(",")[0] == "scalar"


@needs_tree
def test_torch_is_included_in_one_folder_only():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.parent.name != "bindings":
            assert "torch/" not in path.read_text(), f"{path.relative_to(ROOT)} includes torch"


@needs_tree
def test_files_can_be_read_in_one_sitting():
    for folder in ("gptfast", "csrc", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                lines = len(path.read_text().splitlines())
                assert lines <= 800, f"{path.relative_to(ROOT)} has {lines} lines; split it"
