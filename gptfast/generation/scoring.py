"""Log-probabilities of a text under the model, at once or piece by piece."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from gptfast.generation.prompts import check_ids, read_prompt
from gptfast.generation.runner import LanguageModel, beside
from gptfast.generation.sampling import NAN
from gptfast.generation.textless import likeliest

PIECE = 64  # tokens: logits of so many are held at a time

Scored = tuple[float, list[tuple[int, float]]]  # a token's log-probability; the likeliest tokens with probabilities


def score(model: LanguageModel, row: Any, first: int = 1) -> list[float]:
    """How likely the model holds a text: log p(row[t] | row[:t]) for t from `first` to the end.

    Args:
        model: a GPT or a compiled one.
        row: T token ids, 2 <= T <= block_size + 1.
        first: in [1, T).
    Returns:
        T - first numbers, at most 0.
    Raises:
        TypeError, ValueError: not that.
    """
    row, limit = read_prompt("", row), model.config.block_size + 1
    if not 2 <= len(row) <= limit or not 1 <= first < len(row):
        raise ValueError(
            f"score: row has {len(row)} tokens and first is {first}; expected 2 to {limit} tokens (block_size + 1), and 1 <= "
            "first < their number"
        )
    check_ids("", row, model.config.vocab_size)
    logprobs = all_logprobs(model, row)[first - 1 :]
    wanted = torch.tensor(row[first:], dtype=torch.int64, device=logprobs.device)
    return logprobs.gather(-1, wanted[:, None])[:, 0].tolist()


def all_logprobs(model: LanguageModel, row: list[int]) -> Tensor:
    """Log-probabilities, (T - 1, V), of what may follow each token of a sequence of T >= 2 but the last."""
    sequences = model.sequences(1, len(row) - 1)
    with beside(sequences):
        return sequences.extend(sequences.add(), [row[:-1]], last_only=False)[0].log_softmax(-1)


def score_in_pieces(
    model: LanguageModel, ids: list[int], top: int, tokenizer: Any = None
) -> Generator[None, None, list[Scored]]:
    """Yields between two pieces, and returns for every token of a prompt but the first its log-probability and the `top`
    likeliest tokens at its place, of those for which the tokenizer has text.

    Raises:
        RuntimeError: the logits hold nan.
    """
    given, wanted = ids[:-1], ids[1:]
    scored: list[Scored] = []
    if not wanted:
        return scored
    sequences = model.sequences(1, len(given))
    rows = sequences.add()
    for start in range(0, len(given), PIECE):
        piece = slice(start, start + PIECE)
        with beside(sequences), torch.inference_mode():
            logprobs = sequences.extend(rows, [given[piece]], last_only=False)[0].log_softmax(-1)
            if logprobs.isnan().any():
                raise RuntimeError(NAN)
            values, tokens = likeliest(logprobs, top, tokenizer)
            places = torch.tensor(wanted[piece], dtype=torch.int64, device=logprobs.device)
            own = logprobs.gather(-1, places[:, None])[:, 0]
        likely = zip(tokens.tolist(), values.exp().tolist(), strict=True)
        scored += zip(own.tolist(), [list(zip(t, v, strict=True)) for t, v in likely], strict=True)
        yield
    return scored
