"""Texts as rows of ids of which every token is learnt."""

from __future__ import annotations

from gptfast.finetuning.example_files import Examples
from gptfast.finetuning.examples import Row, encoded
from gptfast.tokenizer import Tokenizer


def text_rows(examples: Examples, tokenizer: Tokenizer, limit: int) -> tuple[list[tuple[Row, Row]], int]:
    """(ids, mask) rows of texts, each with the tokenizer's end token.

    A text longer than `limit` becomes several rows, which share one token, so that each token but the first is predicted
    once.

    Args:
        examples: of the task lm.
        tokenizer: of the model.
        limit: the longest row.
    Returns:
        The rows, and how many texts were longer than `limit`.
    Raises:
        ValueError: a text of fewer than two tokens, or one that the tokenizer does not encode.
    """
    rows: list[tuple[Row, Row]] = []
    long = 0
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for record, where in zip(examples.records, examples.where, strict=True):
        ids = encoded(tokenizer.encode, record["text"], where)
        ids += end if ids[-1:] != end else []  # some tokenizers put it there themselves
        if len(ids) < 2:
            raise ValueError(f"{where}: the text has {len(ids)} token; expected at least two, one to be predicted")
        long += len(ids) > limit
        step = max(1, limit - 1)
        for first in range(0, len(ids) - 1, step):
            part = ids[first : first + limit]
            rows.append((part, [1] * len(part)))
    return rows, long
