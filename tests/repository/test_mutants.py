"""The list of scripts/mutants.py fits the tree: each mistake can be put in, and the tests that must find it are there."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def script(monkeypatch):
    if not SCRIPTS.exists():
        pytest.skip("not run from the source tree")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("mutants")
    for name in ("mutants", "mutant_list"):
        sys.modules.pop(name, None)


def test_every_mutant_fits_the_tree(script):
    assert [told for mutant in script.MUTANTS if (told := script.problem(mutant))] == []
    names = [mutant.name for mutant in script.MUTANTS]
    assert len(set(names)) == len(names)
    assert all(("MUTANT" in mutant.new) == mutant.compiled for mutant in script.MUTANTS)


def test_the_build_leaves_avx512_out(script):
    """What is compiled twice over otherwise; the build reads the same line."""
    text = (ROOT / script.ISAS).read_text()
    found = re.findall(r"#define GPTFAST_ISAS.*X\(avx2\).*", script.without_avx512(text))
    assert found == ["#define GPTFAST_ISAS(X, PART) X(scalar) X(avx2)"]
    with pytest.raises(SystemExit, match="lists AVX-512 behind AVX2 0 times; expected once"):
        script.without_avx512(found[0])


def test_every_compiled_mutant_compiles(script, tmp_path):
    """All in one copy, as `make mutants` has them: what they name is still called so."""
    from buildtools import libraries
    from buildtools.toolchain import find_torch

    if "avx2" not in libraries.isas():
        pytest.skip("mistakes are built for AVX2")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    copy, compiled = script.Copy(tmp_path), [mutant for mutant in script.MUTANTS if mutant.compiled]
    for mutant in compiled:
        copy.edit(mutant, mutant.new.replace("MUTANT", "(gptfast_mutant == 1)"))
    header, read = tmp_path / "mutant.h", tmp_path / "read.d"
    header.write_text(script.SWITCH)
    kernels = ["causal_attention_fwd", "dropout", "gelu_fwd", "gemm", "layer_norm_bwd", "layer_norm_fwd", "sum_chunks"]
    units = [unit for unit in libraries.kernel_units("cpu", kernels) if unit.object.endswith(".avx2.o")]
    units += libraries.cpp_units("_ops", [ROOT / "csrc/bindings/layer_norm.cpp"], libraries.stable_abi(find_torch()))
    units += libraries.cpp_units("_C", [ROOT / "csrc/engine/cache.cpp"])
    missing = {mutant.file for mutant in compiled}
    for unit in units:
        source = tmp_path / unit.source.relative_to(ROOT)
        command = [
            os.environ.get("CXX", "g++"),
            "-include",
            header,
            *unit.flags,
            "-fsyntax-only",
            "-MMD",
            "-MF",
            read,
            source,
        ]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        missing -= {file for file in missing if file in read.read_text()}
    assert not missing, "no unit that is compiled here includes it"


def test_a_mutant_that_no_longer_fits_is_reported(script, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    mutant = type(script.MUTANTS[0])("late", "a.py", "x = 2", "x = 3", ("tests/test_a.py",))
    assert "late: a.py has its line 0 times; expected once" in script.problem(mutant, tmp_path)
