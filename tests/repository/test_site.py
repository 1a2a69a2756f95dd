"""The documentation site: its pages, its reference, and that what it shows runs."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from scripts import decoding_pictures, site_pages
from tests.support import ROOT
from tests.support.pages import ELSEWHERE, Reader, blocks, commands_outside_of_blocks, lines_of, make_models, prepare
from tests.support.train_command import _argv, _threads  # noqa: F401

DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="not run from the source tree")
PAGES = sorted(DOCS.rglob("*.md"))
PYTHON_ELSEWHERE = {  # the tests that run the Python of these pages
    "adapters": "tests/finetuning/test_adapter_files.py",
    "coming-from": "tests/repository/test_readme.py",
    "drop-in": "tests/integrations/test_pages_and_examples.py",
    "evaluation": "tests/evaluation",
    "finetuning": "tests/finetuning/test_page.py",
    "serving": "tests/serving/test_chat.py",
}
READ = [ROOT / "README.md", *(page for page in PAGES if blocks(page))]


def test_the_navigation_has_every_page():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    generated = {"overview.md", "contributing.md", "releasing.md", "changelog.md", "reference.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(page.relative_to(DOCS)) for page in PAGES} | generated


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    found = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in found if link != "reference.md" and not (page.parent / link).exists()] == []


def headings(page: Path) -> dict[str, str]:
    """The headings of a page by their anchors on the site."""
    plain = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    texts = [re.sub(r"[`*]", "", text) for text in re.findall(r"^#+ (.*)$", plain, re.M)]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()): text for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_anchors_exist(page: Path):
    found = re.findall(r"\]\((?!https?:)([^)#\s]*\.md)?#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    places = [((page.parent / name) if name else page, anchor) for name, anchor in found if name != "reference.md"]
    assert [(place.name, anchor) for place, anchor in places if anchor not in headings(place)] == []


@pytest.mark.parametrize("name", ["start.md", "index.md"])
def test_a_link_of_the_tasks_is_the_heading_that_it_leads_to(name: str):
    """So whoever follows one sees at once that it is the right place."""
    rows = re.findall(r"^\| (?!I want|---|\|).*$", (DOCS / name).read_text(encoding="utf-8"), re.M)
    assert len(rows) >= 20
    for row in rows:
        links = re.findall(r"\[([^\]]+)\]\(([^)#]+\.md)#?([^)]*)\)", row)
        assert links, row
        for label, target, anchor in links:
            if target != "reference.md":
                there = headings(DOCS / target)
                assert label == (there[anchor] if anchor else next(iter(there.values()))), row


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


def test_commands_are_coloured_as_commands():
    """As pygments does it, which the site uses: a command that it takes for output is grey."""
    pygments = pytest.importorskip("pygments")
    from pygments.lexers import get_lexer_by_name
    from pygments.token import Generic

    count = 0
    for page in PAGES:
        for language, text in re.findall(
            r"^```(console|bash)\n(.*?)^```", site_pages.coloured(page.read_text()), re.M | re.S
        ):
            kinds = {kind for kind, _ in pygments.lex(text, get_lexer_by_name(language))}
            assert Generic.Output not in kinds or Generic.Prompt in kinds, f"{page.name}: {text}"
            count += 1
    assert count > 40
    mixed = "```console\n$ ls\na\n```\n"
    assert site_pages.coloured(mixed) == mixed


def test_every_block_is_run_or_says_why_not():
    """Commands stand in fenced blocks; those that are run by another test are known, and so is the Python of some pages."""
    for page in READ:
        assert commands_outside_of_blocks(page) == [], f"{page.name} has commands that nothing runs"
        for block in blocks(page):
            assert block.language in ("python", "console", "bash", "toml", "yaml", "text", ""), page.name
    for name, tests in PYTHON_ELSEWHERE.items():
        folder = ROOT / tests
        texts = [file.read_text(encoding="utf-8") for file in (folder.rglob("*.py") if folder.is_dir() else [folder])]
        assert any(f"{name}.md" in text for text in texts)
    assert [name for name, tests in ELSEWHERE.items() if tests and not (ROOT / tests).exists()] == []


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
        consoles = [lines_of(block.text) for block in blocks(page) if block.language == "console"]
        fenced = [line[8:] for lines in consoles for line in lines if line.startswith("gptfast ")]
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
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and models that pages name."""
    folder = tmp_path_factory.mktemp("site")
    prepare(folder)
    make_models(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", READ, ids=lambda page: page.stem)
def test_the_page_runs(page: Path, furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a reader who has read no other page, in a folder of his own."""
    python = page.stem not in PYTHON_ELSEWHERE and page.stem != "README"  # tests/repository/test_readme.py runs that
    monkeypatch.chdir(shutil.copytree(furnished, tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    reader = Reader()
    try:
        reader.read(page, python)
    finally:
        reader.close()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From its first cell to its last; the pages show the pictures that it writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    decoding_pictures.run_notebook(tmp_path, steps=3)
    written = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert written == set(re.findall(r"\(pictures/(\S+?)\)", (DOCS / "generation.md").read_text(encoding="utf-8")))


def test_every_picture_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"\(pictures/(\S+?)\)", page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in (DOCS / "pictures").iterdir()}


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
