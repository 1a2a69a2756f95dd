"""gptfast fill-mask: a BERT fills in masked words."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, dataclass
from typing import Any

from gptfast._options import Whole, option, values_of
from gptfast.cli._load import TOKENIZER_HELP
from gptfast.cli._options import Options, takes


@dataclass(frozen=True)
class Masked:
    """The options of `gptfast fill-mask`."""

    model: str = option(
        MISSING, "Checkpoint folder of a BERT, such as runs/bert/best, or a hub id (NAME, or NAME@REVISION)."
    )
    text: list[str] | None = option(
        None, "A text with [MASK] in it; may be given several times. Without it each line of standard input."
    )
    top_k: int = option(5, "How many tokens to show for each mask.", allowed=Whole(1))
    target: list[str] | None = option(None, "Only compare these words, each one token; may be given several times.")
    tokenizer: str | None = option(None, TOKENIZER_HELP, words="the model's own")
    json: bool = option(False, "Print the answers as JSON, as transformers' fill-mask pipeline has them.")


@takes(Options(Masked))
def fill_mask(options: dict[str, Any]) -> None:
    """Fill in the masked words of a text with a BERT.

    Each [MASK] stands for one token. The score is the probability that the
    model gives the token there, from the words on both sides.

    gptfast fill-mask --model runs/bert/best --text "To be, or not to [MASK]."
    """
    from gptfast.models import BERT
    from gptfast.models.bert import load_model
    from gptfast.tokenizer import load_tokenizer

    asked = Masked(**values_of(Masked, options))
    texts = asked.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("fill-mask: there is no `text`; give one with [MASK] in it")
    bert = load_model(asked.model)
    if not isinstance(bert, BERT):
        raise ValueError(
            f"fill-mask: {asked.model} is a GPT, which continues texts (gptfast generate); expected a BERT, such as gptfast train "
            "--objective mlm makes"
        )
    own = None if asked.tokenizer is None else load_tokenizer(asked.tokenizer)
    found = bert.fill_mask(texts, tokenizer=own, top_k=asked.top_k, targets=asked.target or None)
    if asked.json:
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
