"""Options of the command line: made from the fields of configurations, and described once."""

from __future__ import annotations

import re
import typing
from dataclasses import InitVar, dataclass, fields

import click
import pytest
import typer
from typer.testing import CliRunner

import gptfast.data
import gptfast.generation
import gptfast.training
from gptfast import cli
from gptfast._options import Real, Whole, check_fields, describe_fields, option, options_of
from gptfast.cli._errors import _in_options
from gptfast.cli._names import as_options
from gptfast.cli._options import Change, Options, takes
from gptfast.config import GPTConfig
from gptfast.generation import GenerationConfig
from gptfast.training import TrainConfig
from gptfast.training import options as training_options

COMMANDS = typer.main.get_command(cli._commands).commands


@describe_fields
@dataclass(frozen=True)
class Oven:
    """An oven."""

    degrees: int = option(180, "Heat; see `minutes`.", allowed=Whole(1))
    minutes: float | None = option(None, "Time.", words="until done, {}", allowed=Real(above=0, example="20"))
    mode: str = option("fan", "Which heat.", allowed=("fan", "grill"))
    part: float = option(0.5, "Part of the power.", allowed=Real(0, below=1))
    shelf: int = option(1, "Which shelf.", allowed=Whole(1, 4))
    humidity: float = option(0.0, "Share of [[water]] in [0, 1].", allowed=Real(0, most=1, noun="a share"))
    steam: bool = option(False, "With steam.")
    light: bool = option(True, "With light.")
    secret: int = 0


def baked(*arguments: str, **changes: Change) -> dict:
    """The options that a command gets."""
    got = {}
    app = typer.Typer()
    app.command()(takes(Options(Oven, changes=changes))(got.update))
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return got


def test_a_command_gets_the_options_that_were_given_and_no_others():
    assert baked() == {}
    assert baked("--degrees", "180", "--steam", "--no-light") == {"degrees": 180, "steam": True, "light": False}
    assert baked("--heat", "grill", mode=Change(name="heat")) == {"mode": "grill"}


def test_the_help_of_an_option_has_description_default_and_choices():
    app = typer.Typer()
    app.command()(takes(Options(Oven, changes={"degrees": Change(words="hot")}))(print))
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.replace("│", " ").split())
    for text in (
        "--degrees <int> Heat; see --minutes. [default: (hot)]",
        "--minutes <float> Time. [default: (until done, None)]",
        "--mode fan|grill Which heat. [default: fan]",
        "--part <float> Part of the power. [default: 0.5]",
        "--humidity <float> Share of [[water]] in [0, 1]. [default: 0.0]",
        "--steam <bool> With steam. --light --no-light <bool> With light. [default: light]",
    ):
        assert text in shown
    assert "secret" not in shown


def test_a_class_documents_its_fields():
    lines = (Oven.__doc__ or "").splitlines()
    assert lines[0] == "An oven." and "        degrees: Heat; see `minutes`. Default: 180." in lines
    for name in (f.name for f in fields(TrainConfig)):
        assert f"        {name}: " in (TrainConfig.__doc__ or ""), name
    assert "learning_rate: The largest learning rate" in (TrainConfig.__doc__ or "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"degrees": 0}, "Oven: degrees is 0; expected at least 1"),
        ({"degrees": None}, "Oven: degrees is None; expected an int"),
        ({"degrees": True}, "Oven: degrees is True; expected an int"),
        ({"minutes": 0}, "Oven: minutes is 0; expected a number > 0, such as 20"),
        ({"minutes": "x"}, "Oven: minutes is 'x'; expected a number > 0, such as 20"),
        ({"minutes": float("nan")}, "Oven: minutes is nan; expected a number > 0"),
        ({"part": 1.0}, "Oven: part is 1.0; expected a number in [0, 1)"),
        ({"part": float("inf")}, "Oven: part is inf; expected a number in [0, 1)"),
        ({"shelf": 5}, "Oven: shelf is 5; expected at most 4"),
        ({"humidity": 1.01}, "Oven: humidity is 1.01; expected a share in [0, 1]"),
        ({"steam": 1}, "Oven: steam is 1; expected True or False"),
        ({"mode": "steam"}, "Oven: mode is 'steam'; expected one of fan, grill"),
    ],
)
def test_values_that_are_not_allowed(values, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        check_fields("Oven", Oven(**values))
    check_fields("Oven", Oven(minutes=None, part=0, humidity=1, shelf=4))


@pytest.mark.parametrize("command", ["train", "generate", "prepare", "serve"])
def test_every_option_that_a_help_text_names_is_one_of_the_command(command):
    parameters = COMMANDS[command].params
    known = {name for p in parameters for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    for parameter in parameters:
        text = f"{getattr(parameter, 'help', '')} {getattr(parameter, 'show_default', '')}"
        assert set(re.findall(r"(?<![\w-])--[a-z-]+", text)) <= known, parameter.name
        assert "`" not in text, parameter.name
        assert parameter.name == "context" or text.strip(), parameter.name


def test_the_defaults_of_training_are_written_from_their_table(monkeypatch):
    words = training_options.defaults_in_words()
    assert words["learning_rate"] == "0.002; 0.0006 with `preset`; 0.0001 with `init_from`"
    assert words["batch_size"] == "32; 8 with `preset` or `init_from`"
    assert words["n_layer"] == "4; the model's own with `preset` or `init_from`"
    assert words["dropout"] == "0; the model's own with `preset`; 0.1 with `init_from`"
    shown = {
        p.name: p.show_default
        for p in COMMANDS["train"].params
        if isinstance(p, click.Option) or hasattr(p, "show_default")
    }
    assert all(shown[name] == as_options(text) for name, text in words.items())
    monkeypatch.setitem(training_options.DEFAULTS["preset"], "learning_rate", 0.5)
    assert training_options.defaults_in_words()["learning_rate"].startswith("0.002; 0.5 with `preset`")


def test_all_parameters_of_a_configuration_are_described():
    for config in (TrainConfig, GenerationConfig):
        assert [f.name for f in fields(config)] == list(options_of(config))


def test_quoted_names_in_messages_become_the_options_of_the_command():
    options = {"out": "--out", "n_layer": "--n-layer", "dropout": "--dropout"}
    assert (
        _in_options("`n_layer` is 3; choose another `out` than `data`", options)
        == "--n-layer is 3; choose another --out than `data`"
    )
    assert _in_options("replace it, or choose another `out_dir`", options) == "replace it, or choose another --out"
    assert (
        _in_options("name the text of .jsonl with n_layer='text'", options)
        == "name the text of .jsonl with --n-layer 'text'"
    )
    assert _in_options("a.json: n_layer='text'", options) == "a.json: n_layer='text'"
    assert as_options("`n_layer` or `init_from`") == "--n-layer or --init-from"


@pytest.mark.parametrize("package", [gptfast.data, gptfast.generation, gptfast.training])
def test_lazy_packages_have_their_names(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__module__.startswith(package.__name__) and not hasattr(value, "__path__"), name
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_types_of_fields_without_the_check_of_python_3_10(monkeypatch):
    """There `typing.get_type_hints` takes what can be called alone, which an InitVar cannot."""
    check = typing._type_check

    def strict(arg, *args, **kwargs):
        if isinstance(arg, InitVar):
            raise TypeError(f"Forward references must evaluate to types. Got {arg!r}.")
        return check(arg, *args, **kwargs)

    monkeypatch.setattr(typing, "_type_check", strict)
    with pytest.raises(TypeError, match="Forward references"):
        typing.get_type_hints(GPTConfig)
    found = {name: parameter.annotation.__origin__ for name, parameter in Options(GPTConfig).parameters()}
    assert found["dropout"] == (float | None) and found["n_layer"] is int
