"""Log-probabilities of a prompt, piece by piece, so that texts in the making are not kept waiting for a long one."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from gptfast.generation import LanguageModel
from gptfast.generation.choose import NAN
from gptfast.generation.sequences import beside
from gptfast.generation.textless import likeliest

PIECE = 64  # tokens: logits of so many are held at a time

Scored = tuple[float, list[tuple[int, float]]]  # a token's log-probability; the likeliest tokens with probabilities


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
