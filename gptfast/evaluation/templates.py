"""Prompt templates: Jinja2 that turns an item of a task, and solved ones before it, into a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

Item = Mapping[str, Any]
FIRST_LINE = r"^\s*(.*\S)"


class Template:
    """A prompt template, in the sandbox of chat templates.

    Args:
        source: Jinja2. It sees the fields of the item by their names, and `shots`, a list of solved items.
        name: for messages.
        examples: solved items that fit.
        answer: a pattern (`extract_answer`) of the answer in a text that follows a prompt.
        lead: what stands between a prompt and its answer, where that is scored and not written, such as " The answer is".
    Raises:
        ImportError: jinja2 is not installed.  ValueError: the source is no Jinja2.
    """

    def __init__(
        self,
        source: str,
        name: str = "template",
        examples: Sequence[Item] = (),
        answer: str = FIRST_LINE,
        lead: str = "",
    ) -> None:
        from jinja2.exceptions import TemplateSyntaxError

        from gptfast.tokenizer.sandbox import environment

        self.source, self.name, self.examples = source, name, list(examples)
        self.answer, self.lead = answer, lead
        try:
            self._compiled = environment(strict=True).from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"template {name}: line {error.lineno}: {error.message}") from error

    def render(self, item: Item, shots: Sequence[Item] = ()) -> str:
        """The prompt of an item after solved ones.

        Raises:
            ValueError: a field that the template uses is missing, which the message names, or is not what it expects.
        """
        from gptfast.tokenizer.sandbox import ERRORS

        try:
            return self._compiled.render({**item, "shots": list(shots)})
        except ERRORS as error:
            fields = ", ".join(item) or "none"
            raise ValueError(f"template {self.name}: {error}; the item has the fields {fields}") from error


def load_template(name: str) -> Template:
    """A template that the package ships, with its examples.

    sentiment (text, label), translation (source, target), arithmetic (question, answer), arithmetic-cot (question, reasoning,
    answer: a chain of thought, Wei et al., arXiv 2201.11903), and those of the tasks of `gptfast.evaluation.tasks`.

    Raises:
        ValueError: no such template.
    """
    shipped = _shipped()
    if name not in shipped:
        raise ValueError(f"template {name!r}: no such template; expected one of {', '.join(shipped)}")
    return Template(name=name, **shipped[name])


def _shipped() -> dict[str, Any]:
    return json.loads((resources.files("gptfast") / "assets" / "templates.json").read_text("utf-8"))
