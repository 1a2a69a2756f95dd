"""`gptfast evaluate --needle`: a key in a long text, by length and depth."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

from gptfast.cli._evaluate_task import counting, named, shown_name
from gptfast.cli._evaluate_texts import documents_of
from gptfast.cli._load import load
from gptfast.cli._tables import print_whole

_BLOCK, _BLOCKS = 1 << 20, 16  # characters of a block of the haystack, and how many blocks are read


def needles(
    names: list[tuple[str, str | None]], given: Any, texts: Any, seed: int, long: Any, out: Path | None
) -> dict[str, Any]:
    """The result of one model, or {"results": [...]} of several; given, texts and long are options of the command."""
    from gptfast.evaluation.needle import needle_test, plot_needles

    haystack = None
    if texts.data is not None:
        documents = documents_of(texts.data, texts.text_field)
        blocks = chain.from_iterable(document.blocks(_BLOCK) for document in documents)
        haystack = "".join(islice(blocks, _BLOCKS))
    chosen = {"lengths": _lengths(long.lengths), "depths": long.depths, "trials": long.trials, "haystack": haystack}
    results = []
    for name, quantize in names:
        model, tokenizer = load(name, quantize, given.tokenizer, named(given.adapter))
        about = {"model": name, "format": quantize, **({"adapter": given.adapter} if given.adapter else {})}
        with counting(f"{shown_name(about)}, needles", "prompts") as advance:
            results.append({**about, **needle_test(model, tokenizer, **chosen, seed=seed, progress=advance)})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plot_needles({shown_name(result): result for result in results}, out / "needle.png")
    return {"results": results} if given.compare else results[0]


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"evaluate: `lengths` is {text!r}; expected whole numbers such as 1024,4096")
    return [int(part) for part in parts]


def show_needles(value: dict[str, Any]) -> None:
    """Print a table with a row for each model and length, a column for each depth."""
    from rich.console import Console
    from rich.table import Table

    results = value.get("results", [value])
    depths = [f"{depth:.0%}" for depth in results[0]["depths"]]
    table = Table("model", "tokens", *depths, box=None, pad_edge=False)
    for result in results:
        for length, shares in zip(result["lengths"], result["found"], strict=True):
            table.add_row(shown_name(result), f"{length:,}", *(f"{share:.2f}" for share in shares))
    console = Console()
    print_whole(console, table)
    first = results[0]
    told = "; ".join(f"{shown_name(result)}: {result['accuracy']:.1%} found" for result in results)
    line = f"{told}; {first['trials']} keys at each length and depth, seed {first['seed']}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
