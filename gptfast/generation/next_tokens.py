"""The distribution of the next token, before and after the options of a generation.  V vocabulary."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from gptfast.generation.config import GenerationConfig
from gptfast.generation.runner import LanguageModel, single_threaded_torch
from gptfast.generation.sampling import NAN, SamplingContext, probabilities
from gptfast.generation.textless import choosing_text, likeliest

PIECE = 512  # tokens of the text that are read between two yields

Next = tuple[int, float, float]  # id, probability under the model, probability with which it is drawn


def next_tokens_in_pieces(
    model: LanguageModel,
    ids: list[int],
    config: GenerationConfig,
    top: int,
    tokenizer: Any,
    prompt_len: int | None = None,
    adapter: str | None = None,
) -> Generator[None, None, list[Next]]:
    """The most likely next tokens of a text, so that other work on the model can run in between.

    Args:
        ids: 1 to block_size tokens.
        config: how the next token is drawn.
        top: number of tokens; those that are most likely under the model, and of those that may be drawn the most likely.
        tokenizer: excludes ids without text.
        prompt_len: how many of the ids are the prompt's; the others are new to presence and frequency penalties. None: all.
        adapter: of the model, "__base__" for none; None: the active ones.
    Yields:
        None, after each piece of the text.
    Returns:
        Tokens, those that are drawn most often first.
    Raises:
        RuntimeError: the logits hold nan.
    """
    runner = model.runner(1, len(ids))
    slots = runner.allocate(1, adapter)
    for start in range(0, len(ids), PIECE):
        if start:
            yield
        with single_threaded_torch(runner), torch.inference_mode():
            logits = runner.extend(slots, [ids[start : start + PIECE]])[0]
    with single_threaded_torch(runner), torch.inference_mode():
        own = logits.softmax(-1)
        if own[0].isnan():  # one nan makes all of it nan
            raise RuntimeError(NAN)
        config = choosing_text(config, tokenizer, len(own))
        context = SamplingContext(config, 0, ids, len(ids) if prompt_len is None else prompt_len)
        drawn = probabilities(logits, context)
        found = {token for scores in (own, drawn) for token in likeliest(scores, top, tokenizer)[1].tolist()}
    ranked = sorted(found, key=lambda token: (-drawn[token].item(), -own[token].item()))
    return [(token, own[token].item(), drawn[token].item()) for token in ranked[:top]]
