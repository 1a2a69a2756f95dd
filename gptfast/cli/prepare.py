"""gptfast prepare: text to token files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from gptfast._options import Whole, option, values_of
from gptfast.cli._options import Options, takes
from gptfast.data.filters import Filters
from gptfast.data.options import SHARD_TOKENS, DataOptions


@dataclass(frozen=True)
class Output:
    """Where the tokens go."""

    out: Path = option(Path("runs/data"), "Folder for train.bin, val.bin, data.json and the tokenizer's files.")
    shard_tokens: int = option(
        SHARD_TOKENS,
        "Tokens of a file; a text of more becomes train-00001-of-00003.bin and so on.",
        allowed=Whole(1),
    )
    workers: int | None = option(
        None,
        "Processes that encode; threads for less than 32 MB. The files do not depend on it.",
        words="one a core",
        allowed=Whole(1),
    )
    overwrite: bool = option(False, "Replace tokens of another text or tokenizer in OUT.")


@takes(Options(DataOptions), Options(Filters), Options(Output))
def prepare(options: dict[str, Any]) -> None:
    """Turn text into token files once, so that training starts at once and reads them from disk.

    gptfast train does the same with text; prepare is for text that is large or used often. A second run with the
    same arguments does nothing; after an interruption it goes on from where it was, to the same bytes.
    """
    from rich.console import Console
    from rich.table import Table

    from gptfast.data import prepare as prepare_data

    data, filters = DataOptions(**values_of(DataOptions, options)), Filters(**values_of(Filters, options))
    place = Output(**values_of(Output, options))
    writing = {"shard_tokens": place.shard_tokens, "workers": place.workers, "overwrite": place.overwrite}
    try:
        prepared = prepare_data(**vars(data), **vars(filters), **writing, out_dir=place.out)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        raise
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
