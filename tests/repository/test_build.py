"""What was compiled: wide instructions only where cpuid was asked, one OpenMP runtime, files that one can read."""

from __future__ import annotations

import ast
import functools
import gzip
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptfast
from tests.support import ROOT

PACKAGE = Path(gptfast.__file__).parent
needs_ops = pytest.mark.skipif(not (PACKAGE / "_ops.so").exists(), reason="this install has no compiled ops")
needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
needs_tree = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not run from the source tree")


@functools.cache
def disassembled(library: str) -> str:
    """objdump's listing by function; a wheel's library is stripped and has no functions to speak of."""
    (path,) = PACKAGE.glob(library)
    if "no symbols" in subprocess.run(["objdump", "-t", path], capture_output=True, text=True, check=True).stdout:
        pytest.skip(f"{library} is stripped, as in a wheel: which function an instruction is in is not known")
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", path], capture_output=True, text=True, check=True
    ).stdout


@needs_ops
@needs_objdump
@pytest.mark.parametrize("library", ["_ops.so", "_C.abi3.so"])
def test_wide_registers_only_in_their_units(library):
    """No AVX-512 or AVX code outside the functions of the units that were compiled for it."""
    allowed = {"ymm": ("isa_avx2", "isa_avx512", "isa_amx"), "zmm": ("isa_avx512", "isa_amx")}
    seen, function = set(), ""
    for line in disassembled(library).splitlines():
        if line.endswith(">:"):
            function = line
        for register, units in allowed.items():
            if f"%{register}" in line:
                assert any(unit in function for unit in units), f"{register} in {function}: {line}"
                seen.add(register)
    assert seen == {"ymm", "zmm"}, "the check saw no wide code at all"


@needs_ops
@needs_objdump
@pytest.mark.parametrize("library", ["_ops.so", "_C.abi3.so"])
def test_wide_code_clears_the_upper_halves(library):
    """Each function with wide registers has vzeroupper: without it the narrow code after it is slower.

    Compilers leave it out of functions that have vectors as arguments or results."""
    functions = re.split(r"\n(?=[0-9a-f]+ <)", disassembled(library))
    wide = [function for function in functions if re.search(r"%[yz]mm\d", function)]
    assert wide, "the check saw no wide code at all"
    assert not [function.splitlines()[0] for function in wide if "vzeroupper" not in function]


@needs_ops
@needs_objdump
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is Intel's")
@pytest.mark.parametrize(
    ("library", "product"), [("_ops.so", "tdpbf16ps"), ("_C.abi3.so", "tdpbf16ps"), ("_C.abi3.so", "tdpbssd")]
)
def test_tiles_stay_in_registers(library, product):
    """Functions that multiply AMX's tiles. A loop loads two tiles of A and two of B for four products of bf16 and stores none; of
    bytes one stores each product, of two groups."""
    functions = re.split(r"\n(?=[0-9a-f]+ <)", disassembled(library))
    tiled = [f for f in functions if re.search(r"\t(?:tile|tdp|ldtilecfg)", f)]
    assert all("isa_amx" in function.splitlines()[0] for function in tiled)
    order = " ".join(re.findall(r"\t(tile\w+|tdp\w+|ldtilecfg|j\w)", "\n".join(tiled)))
    loop = " ".join(["tileloadd tileloadd tilezero tdpbssd tilestored"] * 2) + " j"
    if product == "tdpbf16ps":
        loop = f"tileloadd tileloadd {product} tileloadd {product} tileloadd {product} {product} j"
    assert loop in order
    assert {"ldtilecfg", "tilezero", "tilestored", "tilerelease"} <= {*order.split()}


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


@needs_ops
def test_the_stub_of_the_compiled_module_is_true():
    """Every name of gptfast/_C.pyi is in the module, and every function and class of the module in the stub."""
    from gptfast import _C

    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    defined = {node.name: node for node in stub.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert set(defined) == {name for name in vars(_C) if not name.startswith("_")}
    for name, node in defined.items():
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(member, ast.FunctionDef):
                assert hasattr(getattr(_C, name), member.name), f"_C.{name} has no {member.name}"


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


@needs_tree
@pytest.mark.parametrize(
    ("missing", "match"),
    [
        (
            "import shutil; shutil.which = lambda *_: None; sys.modules['ninja'] = None",
            "gptfast: no C++ compiler (g++) was found",
        ),
        ("import setuptools; setuptools.__version__ = '68.2.0'", "gptfast: setuptools 68.2.0 is too old"),
    ],
)
def test_a_missing_build_tool_is_one_sentence(missing, match, tmp_path):
    command = ["setup.py", "-q", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"]
    code = f"import runpy, sys; {missing}; sys.argv = {command}; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert match in done.stderr
    assert "Traceback" not in done.stderr


@needs_tree
def test_the_distribution_has_a_name_of_its_own():
    """`gptfast` on PyPI is another project: no document or message may name it for installation."""
    told = re.compile(r"pip install[^\n#]*[ '\"]gptfast(?![-/.\w])")
    for path in [
        ROOT / "README.md",
        ROOT / "setup.py",
        *(ROOT / "gptfast").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
    ]:
        assert not told.search(path.read_text(encoding="utf-8")), f"{path.relative_to(ROOT)} installs another project"


@needs_tree
def test_a_missing_test_package_fails_the_whole_run(tmp_path):
    """`make test` must not skip what an extra is missing for."""
    from tests import conftest

    assert conftest.missing_packages() == []
    project = tmp_path / "pyproject.toml"
    old = """[dependency-groups]
test = [
    "pytest>=8",  # is here
    "no-such-package-of-gptfast>=2",
    "for-another-system; sys_platform == 'plan9'",
]
"""
    project.write_text(old)
    assert conftest.missing_packages(project) == ["no-such-package-of-gptfast"]
    assert "--whole" in (ROOT / "Makefile").read_text()


def test_packed_bytes_are_not_in_the_name_of_a_test(request):
    """They hold the time; pytest-xdist runs nothing where two processes collect different names."""
    from tests import conftest

    assert conftest.pytest_make_parametrize_id(gzip.compress(b"a"), "content") == "content"
    assert conftest.pytest_make_parametrize_id(b"a,b\n", "content") is None
    assert [item.nodeid for item in request.session.items if "\\x8b" in item.nodeid] == []


@needs_tree
def test_slow_files_are_dealt_first():
    from tests import conftest

    files = [ROOT / "tests" / name for name in conftest.SLOWEST_FIRST]
    assert [path.name for path in files if not path.exists()] == []
    assert [conftest.rank(path) for path in files] == list(range(len(files)))
    assert conftest.rank(Path(__file__)) == conftest.rank(Path("/elsewhere/test_some.py")) == len(files)
    assert "--dist loadfile --no-loadscope-reorder" in (ROOT / "Makefile").read_text()
