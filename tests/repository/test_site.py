"""The documentation site: its pages, its reference, and that what it shows runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from scripts import decoding_pictures, site_pages
from tests.support import ROOT
from tests.support.train_command import SMALL, _argv, _threads, gptfast  # noqa: F401

DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="not run from the source tree")
PAGES = sorted(DOCS.rglob("*.md"))
HERE = ["start", "training", "generation", "from-nanogpt", "from-transformers", "from-llama-cpp", "kernels", "reproducibility"]  # fmt: skip
ELSEWHERE = {  # the tests that run the Python of other pages
    "adapters": "tests/finetuning/test_adapter_files.py",
    "coming-from": "tests/repository/test_readme.py",
    "drop-in": "tests/integrations/test_pages_and_examples.py",
    "evaluation": "tests/evaluation",
    "finetuning": "tests/finetuning/test_page.py",
    "serving": "tests/serving/test_chat.py",
}
TEXT = "ROMEO: what light through yonder window breaks?\nIt is the east, and Juliet is the sun. " * 80
SHORT = [*SMALL, "--block-size", "128", "--max-steps", "4", "--eval-every", "2", "--eval-batches", "2"]


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, text, reason not to run it) of the fenced blocks."""
    pattern = r"(?:<!-- not run: (.*?) -->\n)?^```(\w*)\n(.*?)^```"
    return [(m[1], m[2], m[0]) for m in re.findall(pattern, page.read_text(encoding="utf-8"), re.M | re.S)]


def test_the_navigation_has_every_page():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    generated = {"contributing.md", "changelog.md", "reference.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(page.relative_to(DOCS)) for page in PAGES} | generated


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    found = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in found if link != "reference.md" and not (page.parent / link).exists()] == []


def test_the_reference_has_every_public_name():
    listed, text = site_pages.public_names(), site_pages.reference()
    with_names = {
        f"gptfast.{path.parent.name}" for path in ROOT.glob("gptfast/*/__init__.py") if "__all__" in path.read_text()
    }
    assert with_names <= set(listed)
    top = set(listed["gptfast"])
    for module, names in listed.items():
        real = set(importlib.import_module(module).__all__) - site_pages._NOT_LISTED
        assert set(names) == (real if module == "gptfast" else real - top), module
        assert all(f"\n::: {module}.{name}\n" in text for name in names)
        for name in names:
            assert hasattr(importlib.import_module(module), name)


def test_every_block_is_run_or_says_why_not():
    """Python and console blocks of a page are run here, or by the test that is named, or carry a reason."""
    for page in PAGES:
        shown = [language for language, _, reason in blocks(page) if language in ("python", "console") and not reason]
        if shown and page.stem not in HERE:
            assert page.stem in ELSEWHERE, f"{page.name} has blocks that nothing runs"
            tests = ROOT / ELSEWHERE[page.stem]
            texts = [file.read_text(encoding="utf-8") for file in (tests.rglob("*.py") if tests.is_dir() else [tests])]
            assert any(page.name in text for text in texts)


def test_commands_and_their_options_exist():
    """Of every line of a code block or table that begins with `gptfast`."""
    from gptfast.cli import app

    commands: Any = typer.main.get_command(app)
    known = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for name, command in commands.commands.items()
    }
    count = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = re.findall(r"^gptfast (.*)$", "\n".join(code for _, code, _ in blocks(page)), re.M)
        indented = re.findall(r"^ {4,}gptfast ([a-z]+ -.*)$", text, re.M)
        for line in [*fenced, *indented, *re.findall(r"`gptfast ([^`]*)`", text)]:
            words = re.split(r"[\s|]+", line.split("  #")[0])
            if not re.fullmatch(r"[a-z]+", words[0]):
                continue
            assert words[0] in known, f"{page.name}: gptfast {words[0]}"
            options = {re.split(r"[=`,;)]", word)[0] for word in words if re.match(r"--[a-z]", word)}
            assert options <= known[words[0]] | {"--help"}, f"{page.name}: gptfast {' '.join(words)}"
            count += 1
    assert count > 60


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, in which the pages run one after another."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "text.txt").write_text(TEXT)
    return folder


def run_command(line: str) -> int:
    """A command of a page, on a small text and with a small model."""
    words = ["text.txt" if word in ("shakespeare", "plays.txt") else word for word in shlex.split(line)]
    assert words[0] == "gptfast", line
    again = ["--overwrite", *SHORT] if words[1] == "train" else []
    return gptfast(*words[1:], *again)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_the_page_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    if name != "start" and not (place / "runs/bard").exists():
        assert run_command("gptfast train --data shakespeare --out runs/bard") == 0
    names: dict[str, Any] = {}
    shown = [(language, text) for language, text, reason in blocks(DOCS / f"{name}.md") if not reason]
    assert shown
    for n, (language, text) in enumerate(shown):
        if language == "python":
            exec(compile(text, f"{name}.md, block {n}", "exec"), names)
        else:
            assert language == "console", f"{name}.md, block {n} is {language or 'of no language'}"
            assert [run_command(line) for line in text.splitlines()] == [0] * len(text.splitlines())


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From its first cell to its last; the pages show the pictures that it writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    decoding_pictures.run_notebook(tmp_path, steps=3)
    written = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert written == set(re.findall(r"\(pictures/(\S+?)\)", (DOCS / "generation.md").read_text(encoding="utf-8")))
    assert written == {path.name for path in (DOCS / "pictures").iterdir()}


def test_the_citation_has_the_version():
    from gptfast import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_extra_all_and_the_image_name_extras_that_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", project, re.M | re.S)[1]
    extras = set(re.findall(r"^(\w+) = \[", section, re.M))
    [named] = re.findall(r"gptfast-kernels\[([\w,]+)\]\"", section)
    assert set(named.split(",")) < extras
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"\.\[(\w+)\]", image)) == {"serve"} <= extras


def test_the_image_serves_a_model():
    """Docker is not needed here: its last lines are a command that exists, with its options."""
    import json

    from gptfast.cli import app

    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    words = [
        word for key in ("ENTRYPOINT", "CMD") for word in json.loads(re.search(rf"^{key} (\[.*\])$", image, re.M)[1])
    ]
    assert words[:2] == ["gptfast", "serve"]
    commands: Any = typer.main.get_command(app)
    values = commands.commands["serve"].make_context("serve", words[2:], resilient_parsing=True).params
    assert (values["model"], values["host"]) == ("/model", "0.0.0.0")
    assert re.search(r"^USER (?!root)", image, re.M)
