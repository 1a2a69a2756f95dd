"""Documents: paths exist, targets exist, every environment variable is listed, tables of defaults are those of the code."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from gptfast._options import format_value
from gptfast.finetuning import options as finetuning
from gptfast.training.config import TrainConfig
from gptfast.training.options import defaults_of
from tests.support import ROOT

PAGES = ["docs/architecture.md", "docs/developing.md", "docs/glossary.md", "CONTRIBUTING.md", "RELEASING.md"]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="not run from the source tree")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_paths_exist(name):
    """What stands in backquotes and begins with a folder of the tree, and what is linked to."""
    text = page(name)
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("build", "runs"))
    paths = re.findall(rf"`((?:{folders})/[^\s`:]*)", text)
    linked = [str(Path(name).parent / link) for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert paths + linked
    patterns = [str(path).replace("<op>", "gelu").rstrip("/") for path in paths + linked]
    missing = [path for path in patterns if not (ROOT / path).exists() and not list(ROOT.glob(path))]
    assert missing == [], f"{name} names what does not exist"


def test_the_floors_are_those_of_the_contract():
    """The block of docs/architecture.md is what import-linter checks, without names that begin with an underscore."""
    contract = re.search(r"^layers = \[\n(.*?)^\]", page("pyproject.toml"), re.M | re.S)[1]
    block = re.search(r"^```\n(.*?)^```", page("docs/architecture.md"), re.M | re.S)[1]
    lines = [line.split(" | ") for line in re.findall(r'^ *"(.*)",', contract, re.M)]
    shown = [" | ".join(name for name in names if not name.startswith("_")) for names in lines]
    assert block.splitlines() == [line for line in shown if line]


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z-]+):.*##", page("Makefile"), re.M))
    assert set(re.findall(r"(?:^ *|`)make ([a-z-]+)", page(name), re.M)) <= targets


def read_in_the_tree() -> dict[str, set[str]]:
    """Name of each environment variable of gptfast, and the files that read it: there it is a string, or getenv's."""
    found: dict[str, set[str]] = {}
    for folder in ("gptfast", "csrc", "scripts", "tests/support"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                pattern = r"""["'](GPTFAST_[A-Z_]+)["']""" if path.suffix == ".py" else r'getenv\("(GPTFAST_[A-Z_]+)"'
                for name in re.findall(pattern, path.read_text(encoding="utf-8")):
                    found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    for file in ("setup.py", "buildtools/toolchain.py"):
        for name in re.findall(r'environ\.get\("(GPTFAST_[A-Z_]+)"', page(file)):
            found.setdefault(name, set()).add(file)
    return found


def test_environment_variables_are_listed():
    rows = re.findall(r"^\| `(GPTFAST_\w+)` \| [^|]+ \| [^|]+ \| `([^`]+)` \|$", page("docs/developing.md"), re.M)
    listed, found = dict(rows), read_in_the_tree()
    assert listed.keys() == found.keys()
    for name, reader in listed.items():
        assert reader in found[name], f"{name} is said to be read in {reader}; it is named in {sorted(found[name])}"


def test_environment_variables_in_documents_exist():
    """Documents name no variable that nothing reads."""
    known = read_in_the_tree().keys()
    for path in [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile"]:
        assert set(re.findall(r"\bGPTFAST_[A-Z_]+", path.read_text(encoding="utf-8"))) <= known, path.name


def table(path: str, first: str) -> dict[str, list[str]]:
    """The cells of a table by their row's first one. first: that of the heading."""
    lines = page(path).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_the_defaults_of_a_new_run_are_those_in_the_table():
    """docs/training.md, against what `gptfast train` takes."""
    found = table("docs/training.md", "without an option for it | random weights")
    for n, start in enumerate(("", "preset", "init_from")):
        given = {start: "x"} if start else {}
        for objective, where in (("lm", ""), ("mlm", " with `--objective mlm`")):
            wanted = defaults_of({**given, "objective": objective})
            names = ("tokenizer", "learning_rate") if where else ("tokenizer", "learning_rate", "dropout", "batch_size")
            for name in names:
                row = f"`--{name.replace('_', '-')}`{', rows in a pass' * (name == 'batch_size')}{where}"
                usual = TrainConfig().batch_size if name == "batch_size" else "the model's own"
                assert found[row][n] == format_value(wanted.get(name, usual)), (row, start)
        shape = ", ".join(str(wanted[name]) for name in ("n_layer", "n_head", "n_embd", "block_size") if name in wanted)
        row = "`--n-layer`, `--n-head`, `--n-embd`, `--block-size`"
        assert found[row][n] == (shape or "the model's own")


def test_the_defaults_of_fine_tuning_are_those_in_the_table():
    found = table("docs/finetuning.md", "without an option for it | `full`")
    for n, methods in enumerate((("full",), ("lora", "qlora"), ("prompt",))):
        for method in methods:
            wanted = finetuning.DEFAULTS[method]
            assert found["`--learning-rate`"][n] == format_value(wanted["learning_rate"])
            assert found["`--weight-decay`"][n] == format_value(wanted["weight_decay"])
            assert found["`--batch-size`, examples in a pass"][n] == format_value(wanted["batch_size"])
    own = finetuning.MethodOptions()
    lora = f"{own.lora_r}, {own.lora_alpha:g}, {own.target_modules}"
    assert found["`--lora-r`, `--lora-alpha`, `--target-modules`"] == ["", lora, ""]
    assert found["`--num-virtual-tokens`"] == ["", "", str(own.num_virtual_tokens)]
    assert f"`--epochs` is {finetuning.RunOptions().epochs:g}," in page("docs/finetuning.md")
