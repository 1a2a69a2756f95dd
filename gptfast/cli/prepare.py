"""gptfast prepare: text to token files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from gptfast._options import Whole, option, values_of
from gptfast.cli._options import Options, takes
from gptfast.data.options import DataOptions


@dataclass(frozen=True)
class Output:
    """Where the tokens go."""

    out: Path = option(Path("runs/data"), "Folder for train.bin, val.bin, data.json and the tokenizer's files.")
    workers: int | None = option(
        None, "Threads that encode. The files do not depend on it.", words="all cores", allowed=Whole(1)
    )
    overwrite: bool = option(False, "Replace tokens of another text or tokenizer in OUT.")


@takes(Options(DataOptions), Options(Output))
def prepare(options: dict[str, Any]) -> None:
    """Turn text into token files once, so that training starts at once and reads them from disk.

    gptfast train does the same with text; prepare is for text that is large or used often. A second run with the
    same arguments does nothing.
    """
    from rich.console import Console
    from rich.table import Table

    from gptfast.data import prepare as prepare_data

    data, place = DataOptions(**values_of(DataOptions, options)), Output(**values_of(Output, options))
    prepared = prepare_data(
        **(vars(data) | {"out_dir": place.out, "overwrite": place.overwrite, "workers": place.workers})
    )
    table = Table("part", "documents", "bytes", "tokens", "bytes per token", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in ("train", "val"):
        counts = prepared.info[part]
        ratio = counts["bytes"] / counts["tokens"]
        table.add_row(part, str(counts["documents"]), f"{counts['bytes']:,}", f"{counts['tokens']:,}", f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(f"vocabulary: {prepared.tokenizer.vocab_size:,} tokens", highlight=False, markup=False)
    for line in (*prepared.notes, f"next: gptfast train --data {quote(str(place.out))}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
