"""Version and changelog, CI, and the hooks before a commit agree with the code."""

from __future__ import annotations

import os
import re

import pytest

from gptfast._version import __version__
from tests.support import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="not run from a clone of the repository")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_version_is_written_once():
    """Two other files name a version by right: the changelog, and the page on releasing, as an example."""
    whole = re.compile(rf"(?<![\w.]){re.escape(__version__)}(?![\w.]*\d)")
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "setup.py", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")]
    files += [path for folder in ("gptfast", ".github", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    readable = [path for path in files if path.suffix in (".md", ".toml", ".py", ".yml", "")]
    found = {str(path.relative_to(ROOT)) for path in readable if whole.search(path.read_text(encoding="utf-8"))}
    assert found - {"CHANGELOG.md", "RELEASING.md"} == {"gptfast/_version.py"}
    assert 'version = { attr = "gptfast._version.__version__" }' in (ROOT / "pyproject.toml").read_text()


def test_the_changelog_has_a_section_a_version():
    """Keep a Changelog: what is not released first, then versions, the newest first, each with its date."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## (.*)$", text, re.M)
    assert first == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in released), released
    versions = [tuple(map(int, heading[1 : heading.index("]")].split("."))) for heading in released]
    assert versions == sorted(versions, reverse=True)
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_ci_runs_the_script_with_pinned_actions():
    [workflow] = (ROOT / ".github/workflows").glob("*.yml")
    text = workflow.read_text()
    assert "- run: .ci/run" in text and os.access(ROOT / ".ci/run", os.X_OK)
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", action) for action in used), used
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_hooks_run_what_lint_runs():
    """A commit that passes the hooks must not fail in `make lint` for the same reason."""
    hooks = re.findall(r"entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    [lint] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    tools = set(re.findall(r"^\t\$\(BIN\)/([\w-]+)", lint, re.M))
    assert set(hooks) == tools - {"pyright"}, "pyright needs the whole tree"
