"""The `gptfast` command. Each subcommand is a function in a file of its own."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated

import typer

from gptfast.cli._commands import Command
from gptfast.cli._errors import print_error, wants_traceback
from gptfast.cli.bench import bench
from gptfast.cli.chat import chat
from gptfast.cli.doctor import doctor
from gptfast.cli.evaluate import evaluate
from gptfast.cli.explain import explain
from gptfast.cli.fill_mask import fill_mask
from gptfast.cli.finetune import finetune
from gptfast.cli.generate import generate
from gptfast.cli.info import info
from gptfast.cli.prepare import prepare
from gptfast.cli.scaling import scaling
from gptfast.cli.serve import serve
from gptfast.cli.train import TrainCommand, train
from gptfast.cli.watch import watch

app = typer.Typer(
    name="gptfast",
    help="Train, fine-tune and run GPTs, fast on the machine you have.",
    epilog="Start with: gptfast train --data shakespeare --out runs/bard, then gptfast generate --model runs/bard/best "
    '--prompt "ROMEO:"',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from gptfast import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, fine-tune and run GPTs, fast on the machine you have."""


for command in (
    train,
    watch,
    finetune,
    generate,
    chat,
    fill_mask,
    evaluate,
    explain,
    scaling,
    serve,
    prepare,
    info,
    doctor,
    bench,
):
    app.command(cls=TrainCommand if command is train else Command)(command)
_commands = app


def _may_fail(stream: io.TextIOWrapper) -> bool:
    """Whether the stream raises for characters that its encoding lacks; so does surrogateescape, that of the C locale."""
    utf8 = stream.encoding.lower().replace("-", "").replace("_", "") == "utf8"
    return stream.errors == "strict" or (stream.errors == "surrogateescape" and not utf8)


def main() -> None:
    """Run the command line. An error prints one line to standard error and exits with code 1, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and _may_fail(stream):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without file and line of the package
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if wants_traceback():
            raise
        print_error(error, _options_of(sys.argv[1:2]))
        sys.exit(1)


def _options_of(command: list[str]) -> dict[str, str]:
    """The option of each parameter of a command, such as {"max_steps": "--max-steps"}."""
    commands = getattr(typer.main.get_command(_commands), "commands", {})
    parameters = [p for name in command if name in commands for p in commands[name].params]
    return {p.name: p.opts[0] for p in parameters if p.opts and p.opts[0].startswith("--")}
