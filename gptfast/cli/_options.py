"""The options of a command, made from the described fields of configurations (`gptfast._options`)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any

import typer

from gptfast._options import default_of, default_text, options_of
from gptfast.cli._names import as_options, option_name

_KEEP: Any = object()


@dataclass(frozen=True)
class Change:
    """How an option differs from the field that it is made from.

    name: of the option, such as "stop" for stop_strings; "": as the field.
    default, words: the default on the command line, and in words; `_KEEP`, "": as the field.
    help, more: another description, and sentences that follow it.
    type: of the value; None: as the field.
    argument: given by its place instead of by a name.
    both: a flag with its opposite, --bos and --no-bos.
    """

    name: str = ""
    default: Any = _KEEP
    words: str = ""
    help: str = ""
    more: str = ""
    type: Any = None
    argument: bool = False
    both: bool = False


@dataclass(frozen=True)
class Options:
    """The options of a command that come from one configuration.

    source: a dataclass whose fields are described.
    only: the fields to take, in their order; empty: all that are described (with `grouped`: and have a group).
    group: heading above the options; "": each field's own.
    grouped: leave out fields without a group.
    changes: by the name of the field.
    """

    source: type
    only: Collection[str] = ()
    group: str = ""
    grouped: bool = False
    changes: Mapping[str, Change] = field(default_factory=dict)

    def parameters(self) -> Iterator[tuple[str, inspect.Parameter]]:
        """(name of the field, parameter for Typer) of every option."""
        hints = _hints(self.source)
        described_fields = options_of(self.source)
        for name in self.only or described_fields:
            described = described_fields[name]
            group = self.group or described.group
            if self.grouped and not group:
                continue
            change = self.changes.get(name, Change())
            default = default_of(self.source, name) if change.default is _KEEP else change.default
            own = change.default is _KEEP and default is not MISSING
            words = change.words or (default_text(described, default) if own else "")
            is_value = not words or (own and not change.words and not described.default)
            choices = described.allowed if isinstance(described.allowed, tuple) else ()
            names = [option_name(name)] if default is False and not change.both else []  # a flag, without its opposite
            option = (typer.Argument if change.argument else typer.Option)(
                *names,
                help=_shown(f"{change.help or described.help} {change.more}".strip()),
                show_default=(default is not None and default is not False) if is_value else as_options(words),
                rich_help_panel=group or None,
                metavar="|".join(choices) or None,
            )
            yield (
                name,
                inspect.Parameter(
                    change.name or name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if default is MISSING else default,
                    annotation=Annotated[change.type or _plain(hints[name]), option],
                ),
            )


def _shown(text: str) -> str:
    """A description as a help text: names of fields are options, and [[source]] is text, which Rich takes for markup."""
    return re.sub(r"\[(?=[a-z#/@])", r"\\[", as_options(text))


def _hints(source: type) -> dict[str, Any]:
    """The types of a dataclass's fields. `typing.get_type_hints` of Python 3.10 refuses an `InitVar`."""
    return {
        name: hint
        for base in reversed(source.__mro__)
        for name, hint in inspect.get_annotations(base, eval_str=True).items()
    }


def _plain(hint: Any) -> Any:
    """The type of a value of an `InitVar`, or the hint itself."""
    return getattr(hint, "type", hint)


def takes(*options: Options) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """A decorator: a command with these options, in this order.

    The function is called with the options that were given, by the names of their fields; what was not given is not there,
    so that a function can tell a default from a choice. Values from a file of options would be merged there.
    """

    def decorate(run: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        pairs = [pair for one in options for pair in one.parameters()]
        fields = {parameter.name: name for name, parameter in pairs}

        def command(click_context: typer.Context, **values: Any) -> None:
            sources = {name: click_context.get_parameter_source(name) for name in values}
            run({fields[name]: values[name] for name, source in sources.items() if source and source.name != "DEFAULT"})

        first = inspect.Parameter("click_context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [first, *(parameter for _, parameter in pairs)]
        command.__name__, command.__doc__, command.__module__ = run.__name__, run.__doc__, run.__module__
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate
