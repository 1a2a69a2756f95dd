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
        except Exception as error:
            known = {p.name: p.opts[0] for p in self.params if p.name and p.opts[0].startswith("--")}
            if getattr(error, "possibilities", None) is not None and str(getattr(error, "option_name", "")).startswith(
                "--"
            ):
                error.possibilities = [known[name] for name in likely(error.option_name, known, most=3)]  # pyright: ignore[reportAttributeAccessIssue]
            elif _EXTRA in getattr(error, "message", "") and "data" in known and "--data" in given:
                error.message += (
                    "; --data takes one file or folder: for several give their folder, and --glob for their names"  # pyright: ignore[reportAttributeAccessIssue]
                )
            raise
