"""gptfast prepare: text to token files."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer


def prepare(
    data: Annotated[
        str,
        typer.Option(
            help="The text: 'shakespeare' (42 plays and poems, built in), 'shakespeare:comedy,poetry' (some "
            "of them), a UTF-8 text file, a folder whose .txt files are one document each, or a file or folder of records "
            "(see --text-field)."
        ),
    ] = "shakespeare",
    glob: Annotated[
        list[str] | None,
        typer.Option(
            help="Which files of a folder to read, such as '*.md'; may be given several times.", show_default="*.txt"
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            help="The field of a record that is the text, in .jsonl, .json, .csv, .tsv and .parquet files; each record "
            "is a document."
        ),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="How text becomes numbers. gpt2: GPT-2's 50257 subwords, to fine-tune or compare with it. "
            "char: one number per character, best for a small model and a few minutes. word: one per word. "
            "bpe: subwords learnt from your text. Or the FOLDER of a checkpoint, to use its tokenizer."
        ),
    ] = "gpt2",
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="How many tokens bpe learns (default 8192), or word keeps (default all). More tokens make "
            "shorter sequences, and a larger embedding matrix."
        ),
    ] = None,
    unk: Annotated[
        bool,
        typer.Option(
            "--unk", help="char: a token <|unk|> for characters that the text does not have; else they are refused."
        ),
    ] = False,
    val_fraction: Annotated[
        float,
        typer.Option(
            help="Part of the text that training never sees, to measure how well the model predicts new "
            "text. Whole documents are kept where there are enough."
        ),
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Chooses the documents for validation.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for train.bin, val.bin, data.json and the tokenizer's files.")
    ] = Path("runs/data"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace tokens of another text or tokenizer in OUT.")
    ] = False,
) -> None:
    """Turn text into token files, once, so that training can start at once and read them from disk.

    gptfast train does the same when it is given text; prepare is for text that is used often, or large. A
    second run with the same arguments does nothing.
    """
    from rich.console import Console
    from rich.table import Table

    from gptfast.data import prepare as prepare_data

    prepared = prepare_data(
        data,
        tokenizer,
        out,
        vocab_size=vocab_size,
        unk=unk,
        glob=glob,
        text_field=text_field,
        val_fraction=val_fraction,
        seed=seed,
        overwrite=overwrite,
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
    for line in (*prepared.notes, f"next: gptfast train --data {quote(str(out))}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
