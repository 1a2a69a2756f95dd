"""Scoring: the log-probabilities that a model gives to the tokens of a text.  T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from gptfast.generation.prompts import check_ids, read_prompt
from gptfast.generation.runner import LanguageModel, single_threaded_torch, virtual_tokens
from gptfast.generation.sampling import NAN
from gptfast.generation.textless import likeliest

PIECE = 64  # tokens whose logits are held at a time

Scored = tuple[float, list[tuple[int, float]]]  # log-probability of a token; the most likely tokens with probabilities


def score(model: LanguageModel, tokens: Any, first: int = 1, adapter: str | None = None) -> list[float]:
    """Log-probabilities of a text under the model: log p(tokens[t] | tokens[:t]) for t from `first` to the end.

    Args:
        model: a GPT, a compiled one, or a runner.
        tokens: T token ids, 2 <= T <= block_size + 1.
        first: in [1, T).
        adapter: of the model, "__base__" for none; None: the active ones.
    Returns:
        T - first numbers, at most 0.
    Raises:
        TypeError, ValueError: bad tokens or `first`, or an unknown adapter.  RuntimeError: the logits hold nan.
    """
    tokens, limit = read_prompt("", tokens), model.config.block_size - virtual_tokens(model, adapter) + 1
    if not 2 <= len(tokens) <= limit or not 1 <= first < len(tokens):
        raise ValueError(
            f"score: tokens has {len(tokens)} ids and first is {first}; expected 2 to {limit} tokens (block_size + 1, less "
            "those of a soft prompt), and 1 <= first < their number"
        )
    check_ids("", tokens, model.config.vocab_size)
    pieces = score_in_pieces(model, tokens, piece=len(tokens), adapter=adapter)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return [logprob for logprob, _ in end.value[first - 1 :]]


def score_in_pieces(
    model: LanguageModel,
    tokens: list[int],
    top: int = 0,
    tokenizer: Any = None,
    piece: int | None = None,
    adapter: str | None = None,
) -> Generator[None, None, list[Scored]]:
    """Score a text piece by piece, so that other work on the model can run in between.

    Args:
        tokens: T ids; a text of fewer than two has no scores.
        top: number of most likely tokens to return at each position.
        tokenizer: excludes ids without text from these.
        piece: number of tokens between two yields; None: PIECE.
        adapter: as in `score`.
    Yields:
        None, after each piece.
    Returns:
        For each token but the first its log-probability, and the `top` most likely tokens at its position.
    Raises:
        RuntimeError: the logits hold nan.
    """
    given, wanted, piece = tokens[:-1], tokens[1:], piece or PIECE
    scored: list[Scored] = []
    if not wanted:
        return scored
    runner = model.runner(1, len(given))
    slots = runner.allocate(1, adapter)
    for start in range(0, len(given), piece):
        part = slice(start, start + piece)
        with single_threaded_torch(runner), torch.inference_mode():
            logprobs = runner.extend(slots, [given[part]], last_only=False)[0].log_softmax(-1)
            if logprobs[:, 0].isnan().any():  # one nan makes all of its row nan
                raise RuntimeError(NAN)
            own = torch.tensor(wanted[part], dtype=torch.int64, device=logprobs.device)
            found = logprobs.gather(-1, own[:, None])[:, 0].tolist()
            likely: list[list[tuple[int, float]]] = [[] for _ in found]
            if top:
                values, ids = likeliest(logprobs, top, tokenizer)
                pairs = zip(ids.tolist(), values.exp().tolist(), strict=True)
                likely = [list(zip(i, v, strict=True)) for i, v in pairs]
        scored += zip(found, likely, strict=True)
        yield
    return scored
