"""`gptfast evaluate --data`: perplexity of texts, by position too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast.cli._evaluate_task import counting, named, shown_name
from gptfast.cli._load import load
from gptfast.cli._tables import print_whole

if TYPE_CHECKING:
    from gptfast.data import Document


def perplexities(
    names: list[tuple[str, str | None]], given: Any, texts: Any, out: Path | None, by_position: bool
) -> dict[str, Any]:
    """The result of one model, or {"results": [...], ...} of several; `given` and `texts` are options of the command."""
    from gptfast.evaluation import Settings, compare, score_documents, summarise

    asked = Settings(texts.context, texts.stride, texts.bos, texts.join, texts.detokenize)
    documents = documents_of(texts.data, texts.text_field)
    if by_position:
        return _by_position(names, given, documents, asked, out)
    results, scores = [], []
    for name, quantize in names:
        model, tokenizer = load(name, quantize, given.tokenizer, named(given.adapter))
        with counting(f"{name}, {sum(document.size for document in documents):,} bytes", "tokens") as advance:
            scores.append(score_documents(model, documents, tokenizer, asked, advance))
        about = {"model": name, "format": quantize, **({"adapter": given.adapter} if given.adapter else {})}
        results.append({**about, **summarise(scores[-1], asked.resolved(model))})
    if not given.compare:
        return results[0]
    pairs = [
        {**{key: row[key] for key in ("model", "format")}, **compare(scores[0], other)}
        for row, other in zip(results[1:], scores[1:], strict=True)
    ]
    if len({row["tokens"] for row in results}) > 1:
        print(
            "warning: the models cut the text into different tokens, so nats a token of one are not those of another; compare bits "
            "per byte",
            file=sys.stderr,
        )
    return {"results": results, "comparisons": pairs}


def _by_position(
    names: list[tuple[str, str | None]], given: Any, documents: list[Document], asked: Any, out: Path | None
) -> dict[str, Any]:
    from gptfast.evaluation.by_position import loss_by_position, plot_positions

    results = []
    for name, quantize in names:
        model, tokenizer = load(name, quantize, given.tokenizer, named(given.adapter))
        about = {"model": name, "format": quantize, **({"adapter": given.adapter} if given.adapter else {})}
        with counting(f"{shown_name(about)}, by position", "tokens") as advance:
            results.append({**about, **loss_by_position(model, documents, tokenizer, asked, progress=advance)})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot_positions({shown_name(result): result for result in results}, out / "positions.png")
    return {"results": results} if given.compare else results[0]


def documents_of(data: str, text_field: str) -> list[Document]:
    from gptfast.data import load_documents
    from gptfast.data.records import RECORDS, kind_of

    records = kind_of(data)[0] in RECORDS
    documents = load_documents(data, text_field=text_field if records else None)
    if not documents:
        raise ValueError(f"evaluate: {data} holds no text")
    return documents


def show_texts(value: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, results = Console(), value.get("results", [value])
    columns = ("perplexity", "word_perplexity", "char_perplexity", "byte_perplexity", "bits_per_byte")
    table = Table("model", *(name.replace("_", " ") for name in columns), box=None, pad_edge=False)
    for row in results:
        name = shown_name(row)
        table.add_row(name, *("-" if row[column] is None else f"{row[column]:.4f}" for column in columns))
    print_whole(console, table)
    if "positions" in results[0]:
        _show_positions(results)
    first = results[0]
    counted = ", ".join(f"{first[name]:,} {name}" for name in ("tokens", "words", "characters", "bytes"))
    windows = f"context {first['context']}, stride {first['stride']}"
    edge = "a first token before each" if first["bos"] else "the first token of each not scored"
    for line in (
        f"scored   {counted}",
        f"windows  {windows}",
        f"texts    {first['documents']:,} documents, {edge}; detokenize {first['detokenize']}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for row in value.get("comparisons", []):
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.5f}"
        name = shown_name(row)
        line = f"{name} - {shown_name(first)}: {row['difference']:+.5f}{error} nats a token over {row['documents']} documents"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _show_positions(results: list[dict[str, Any]]) -> None:
    """A table of some of the positions."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "positions", "perplexity", "tokens", box=None, pad_edge=False)
    for result in results:
        rows = result["positions"]
        for row in rows[:: max(1, len(rows) // 8)]:
            numbers = f"{row['first']:,} to {row['last']:,}", f"{row['perplexity']:.4f}", f"{row['tokens']:,}"
            table.add_row(shown_name(result), *numbers)
    print_whole(Console(), table)
