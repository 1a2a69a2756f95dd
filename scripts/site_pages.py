"""Hooks of mkdocs: the pages of the site that docs/ does not have, and links out of docs/.

README.md, CONTRIBUTING.md, RELEASING.md and CHANGELOG.md become pages. The reference lists every public name, module by module, from the
`__all__` of each package; mkdocstrings fills in its signature and docstring. Links to other files of the tree become their paths.
Blocks of commands are coloured as commands.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("", "ops", "nn", "models", "generation", "engine", "training", "finetuning", "evaluation", "ladder", "data", "tokenizer",
           "integrations", "benchmarking", "testing")  # fmt: skip
_PAGES = {
    "overview.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "releasing.md": "RELEASING.md",
    "changelog.md": "CHANGELOG.md",
}
_NOT_LISTED = {"__version__", "scaling", "metrics", "engine", "nn", "ops"}  # a number, and modules
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")


def public_names() -> dict[str, list[str]]:
    """The public names of each module of `MODULES`, in the order of its __all__; nothing is imported."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()  # names of the top, such as GPT, stand there alone
    for module in MODULES:
        folder = ROOT / "gptfast" / module
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        lists = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        ]
        names = [name for value in lists for name in ast.literal_eval(value)]
        found[f"gptfast.{module}".rstrip(".")] = [name for name in names if name not in _NOT_LISTED | seen]
        seen = seen or set(names)
    return found


def reference() -> str:
    """The page of the reference, as Markdown for mkdocstrings."""
    parts = [
        "# Reference",
        "Every public name, from its docstring. What is not here is not for users and may change.",
        "",
    ]
    for module, names in public_names().items():
        tree = ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
        parts += [f"## {module}", "", ast.get_docstring(tree) or "", ""]
        for name in names:
            parts += [f"::: {module}.{name}", ""]
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    texts = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in _PAGES.items()}
    for name, text in {**texts, "reference.md": reference()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def coloured(markdown: str) -> str:
    """The text with its blocks `console` as `bash`, where they hold commands alone: without a prompt that marks the commands
    among their output, all of a block `console` is output, and grey."""
    return _CONSOLE.sub(lambda m: m[0] if re.search(r"^\$ ", m[1], re.M) else f"```bash\n{m[1]}```", markdown)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to pages stay; those to other files of the tree become the path, which a reader of the sources finds."""
    markdown = coloured(markdown)
    source = _PAGES.get(page.file.src_uri)
    folder = ROOT if source else (ROOT / "docs" / page.file.src_uri).parent

    def replaced(match: re.Match[str]) -> str:
        target, anchor = (folder / match[1]).resolve(), match[2] or ""
        if not target.is_relative_to(ROOT):
            return match[0]
        path = str(target.relative_to(ROOT))
        names = {source: name for name, source in _PAGES.items()}
        if path in names or path.startswith("docs/"):
            depth = page.file.src_uri.count("/")
            return f"]({'../' * depth}{names.get(path, path.removeprefix('docs/'))}{anchor})"
        return f'](# "{path} in the sources")'

    return _LINK.sub(replaced, markdown)
