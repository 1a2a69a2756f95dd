"""Every folder reaches only what stands below it; import-linter, which `make lint` runs, checks the rest of Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not run from the source tree")

PACKAGE = ROOT / "gptfast"
TOP = {"cli", "demo.py", "demo_finetune.py", "__main__.py", "__init__.py"}  # these stand above all others
INCLUDED = {  # by the files of each folder of csrc; "." has what all share
    ".": {"."},
    "cpu": {".", "cpu"},
    "cuda": {".", "cuda"},
    "engine": {".", "cpu", "engine"},
    "bindings": {".", "cpu", "cuda", "bindings"},
    "python": {".", "cpu", "engine", "python"},
}


def names_from_the_package(source: str) -> Iterator[str]:
    """The names that a module takes from gptfast/__init__.py, and "*" for the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "gptfast":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ("*" for alias in node.names if alias.name == "gptfast")


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()


def test_the_names_of_the_package_are_for_users():
    """The contract lets modules import `gptfast`, for `_C` and `__version__`; its other names would lead to the top."""
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.parts[0] not in TOP:
            names = {name for name in names_from_the_package(path.read_text()) if not is_module(name)}
            assert names <= {"_C", "__version__"}, f"gptfast/{place} imports {names} from gptfast; name their modules"


def test_names_from_the_package_are_found():
    source = "from gptfast import GPT, _C\ndef f():\n    import gptfast\n    from gptfast.nn import Linear\n"
    assert list(names_from_the_package(source)) == ["GPT", "_C", "*"]


def included(path: Path) -> Iterator[str]:
    """The folders of csrc, "." for csrc itself, of the files that a C++ file includes."""
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
        file = (path.parent / name).resolve()
        assert file.exists(), f"{path} includes {name}, which is not beside it"
        yield file.parent.relative_to(ROOT / "csrc").as_posix()


def test_cpp_includes_what_stands_below():
    seen = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            folder = path.parent.relative_to(ROOT / "csrc").as_posix()
            assert folder in INCLUDED, f"csrc/{folder} has no floor; give it one here"
            for other in included(path):
                assert other in INCLUDED[folder], f"csrc/{folder}/{path.name} includes a file of csrc/{other}"
                seen.add((folder, other))
    assert {("engine", "cpu"), ("bindings", "cpu"), ("python", "engine")} <= seen, "the check saw no includes"
