"""gptfast fill-mask: a BERT fills in masked words."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from gptfast.cli._load import TOKENIZER_HELP


def fill_mask(
    model: Annotated[str, typer.Option(help="Checkpoint folder of a BERT, such as runs/bert/best, or a hub id.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A text with [MASK] in it; may be given several times. Without it each line of standard input."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many tokens to show for each mask.")] = 5,
    target: Annotated[
        list[str] | None, typer.Option(help="Only compare these words, each one token; may be given several times.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP, show_default="the model's own")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answers as JSON, as transformers' fill-mask pipeline has them.")
    ] = False,
) -> None:
    """Fill in the masked words of a text with a BERT.

    Each [MASK] stands for one token. The score is the probability that the
    model gives the token there, from the words on both sides.

    gptfast fill-mask --model runs/bert/best --text "To be, or not to [MASK]."
    """
    from gptfast.models import BERT
    from gptfast.tokenizer import load_tokenizer

    texts = text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("fill-mask: there is no `text`; give one with [MASK] in it")
    bert = BERT.from_pretrained(model)
    own = None if tokenizer is None else load_tokenizer(tokenizer)
    found = bert.fill_mask(texts, tokenizer=own, top_k=top_k, targets=target or None)
    if as_json:
        import json

        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for one, answers in zip(texts, found if len(texts) > 1 else [found], strict=True):
        _show(one, answers)


def _show(text: str, answers: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    masks = answers if isinstance(answers[0], list) else [answers]
    for n, found in enumerate(masks):
        title = escape(text) + (f"  (mask {n + 1})" if len(masks) > 1 else "")
        table = Table("score", "token", "id", "text", title=title, title_justify="left")
        for answer in found:
            row = (answer["token_str"], str(answer["token"]), answer["sequence"])
            table.add_row(f"{answer['score']:.1%}", *map(escape, row))
        Console().print(table)
