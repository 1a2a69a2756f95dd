"""Commands whose errors say which option may have been meant."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from gptfast._other_names import likely

_EXTRA = "unexpected extra argument"


class Command(TyperCommand):
    """A command that answers another program's name of an option with its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)  # the parser takes them out
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer's errors have no public names; all of them go on
            self._say_ours(error, given)
            raise

    def _say_ours(self, error: Any, given: list[str]) -> None:
        """Put our options into an error about an option or an argument that is not there."""
        known = {p.name: p.opts[0] for p in self.params if p.name and p.opts[0].startswith("--")}
        option, possible = str(getattr(error, "option_name", "")), getattr(error, "possibilities", None)
        if possible is not None and option.startswith("--"):
            error.possibilities = [known[name] for name in likely(option, known, most=3)]
        elif _EXTRA in getattr(error, "message", "") and "data" in known and "--data" in given:
            error.message += (
                "; --data takes one file or folder: for several give their folder, and --glob for their names"
            )
