"""Tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDEST = 1000  # columns


def print_whole(console: Console, table: Table) -> None:
    """Print a table without cutting a cell: where the terminal is narrower, its lines are wrapped by the terminal.

    rich would end "runs/bard/best:int8" and "runs/bard/best:q4" alike, in an ellipsis.
    """
    wide = console.options.update(max_width=_WIDEST)
    table.width = max(console.measure(table, options=wide).maximum, 1)
    console.print(table, crop=False)
