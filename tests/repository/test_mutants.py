"""The list of scripts/mutants.py fits the tree: each mistake can be put in, and the tests that must find it are there."""

from __future__ import annotations

import importlib
import re
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


def test_a_mutant_that_no_longer_fits_is_reported(script, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    mutant = type(script.MUTANTS[0])("late", "a.py", "x = 2", "x = 3", ("tests/test_a.py",))
    assert "late: a.py has its line 0 times; expected once" in script.problem(mutant, tmp_path)
