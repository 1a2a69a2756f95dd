"""Every folder reaches only what stands below it; import-linter, which `make lint` runs, checks the rest of Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptfast._files import read_toml
from tests.support import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not run from the source tree")

PACKAGE = ROOT / "gptfast"
NAMES_GIVEN = {  # these import what a caller names, in a text that the test sees there
    *("_lazy.py", "data/columns.py", "finetuning/metrics.py"),
}
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
    """Whether a name below `gptfast`, with dots, is that of a module."""
    path = PACKAGE / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


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


def floors() -> dict[str, int]:
    """The number of each package's floor in the contract of import-linter, 0 at the top."""
    contract = read_toml(ROOT / "pyproject.toml")["tool"]["importlinter"]["contracts"][0]
    return {name: floor for floor, names in enumerate(contract["layers"]) for name in names.split(" | ")}


def names_in_texts(source: str) -> Iterator[str]:
    """The modules of the package that texts name, without `gptfast.`; also where a text has only the beginning."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.fullmatch(r"gptfast\.(\w+(?:\.\w+)*)\.?", node.value)
            if found and is_module(found[1]):
                yield found[1]


def imported_by_name(source: str) -> Iterator[ast.expr]:
    """What the calls of a module import at run time."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args)
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("import_module", "__import__", "run_module", "resolve_name"):
            yield call.args[0]


def test_no_text_names_a_module_that_stands_above():
    """import-linter does not see `import_module("gptfast.models")`, nor a table of such names."""
    floor, seen = floors(), set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        own = place.parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        source = path.read_text()
        for name in names_in_texts(source):
            other = name.split(".")[0]
            below = other == own or floor[other] > floor[own]
            assert below, f"gptfast/{place} names gptfast.{name}, which does not stand below it"
            seen.add(other)
        for argument in imported_by_name(source):
            told = f"gptfast/{place} imports {ast.unparse(argument)} at run time; import it, or a text that names it"
            if isinstance(argument, ast.JoinedStr):  # a submodule of the package itself
                assert ast.unparse(argument).startswith("f'{__name__}."), told
            else:
                assert isinstance(argument, ast.Constant) or place.as_posix() in NAMES_GIVEN, told
    assert {"training", "checkpoints"} <= seen, "the check saw no names"


def test_names_in_texts_are_found():
    source = (
        'import_module("gptfast.models")\nx = {"A": "gptfast.nn.linear", "B": "gptfast.nowhere"}\nf"gptfast.nn.{x}"\n'
    )
    assert list(names_in_texts(source)) == ["models", "nn.linear", "nn"]
    (argument,) = imported_by_name("import importlib as i\ni.import_module(where)\n")
    assert ast.unparse(argument) == "where"


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
