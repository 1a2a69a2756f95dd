"""The Jinja2 of chat templates: transformers' environment, in which a template can read and write nothing but its messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Undefined, nodes, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Span = tuple[int, int]


class Replies(Extension):
    """The block {% generation %} … {% endgeneration %}: its characters in the text are noted."""

    tags = {"generation"}  # noqa: RUF012 - so jinja2 wants it

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        environment.extend(following=self.following)
        self._followed: ContextVar[tuple[list[str], list[Span]] | None] = ContextVar("followed", default=None)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _note(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        text, followed = caller(), self._followed.get()
        if followed is not None:
            blocks, spans = followed
            start = sum(map(len, blocks))
            spans.append((start, start + len(text)))
        return text

    @contextmanager
    def following(self, blocks: list[str]) -> Iterator[list[Span]]:
        """Note the replies of a rendering whose blocks are appended to `blocks` as they come."""
        spans: list[Span] = []
        token = self._followed.set((blocks, spans))
        try:
            yield spans
        finally:
            self._followed.reset(token)


class _Names(Namespace):
    """jinja2's namespace, without names that begin with an underscore: these reach the interpreter."""

    def __init__(*args: Any, **names: Any) -> None:
        self, *others = args
        found = dict(*others, **names)
        for name in found:
            _refuse_hidden(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


class _Dict:
    """dict(…) without the attributes of the class."""

    def __call__(self, *args: Any, **names: Any) -> dict[Any, Any]:
        return dict(*args, **names)


# What a template may raise: beside Jinja2's own, operations on values that it did not expect, such as content that is no text.
ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


def environment(strict: bool = False) -> ImmutableSandboxedEnvironment:
    """A new environment with the filters and functions that templates of the Hugging Face hub use.

    strict: a name that the template is not given is an error, instead of nothing.
    """
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Replies, loopcontrols],
        undefined=StrictUndefined if strict else Undefined,
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Names}
    return made


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with an underscore at its beginning, and {name!r} is one")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
