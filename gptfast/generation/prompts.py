"""Prompts: checked, and run through the model into one cache.  B rows, T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.models.kv_cache import KVCache

if TYPE_CHECKING:
    from gptfast.models import GPT


def read_prompts(ids: Any, model: GPT, max_new_tokens: int) -> list[list[int]]:
    """The prompts as lists of ids.

    Args:
        ids: (B, T) or (T,) int64 tensor, a list of id lists of any lengths, or one list of ids.
        model: whose vocabulary and block_size they must fit.
        max_new_tokens: that must fit behind them.
    Raises:
        TypeError, ValueError: not that, empty, outside the vocabulary, or too long.
    """
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
            raise TypeError(
                f"generate: ids is a {ids.dtype} tensor of shape {tuple(ids.shape)}; expected (B, T) token ids"
            )
        rows = ids.tolist() if ids.dim() == 2 else [ids.tolist()]
    elif isinstance(ids, Sequence) and not isinstance(ids, str):
        rows = [list(ids)] if ids and isinstance(ids[0], int) else [list(row) for row in ids]
    else:
        raise TypeError(f"generate: ids is a {type(ids).__name__}; expected a (B, T) tensor or a list of id lists")
    if not rows:
        raise ValueError("generate: ids holds no prompts; give at least one")
    for n, row in enumerate(rows):
        _check_row(n, row, model, max_new_tokens)
    return rows


def _check_row(n: int, row: list[int], model: GPT, max_new_tokens: int) -> None:
    V, limit = model.config.vocab_size, model.config.block_size
    if not row:
        raise ValueError(
            f"generate: prompt {n} is empty; give at least one token, such as the end-of-text token or a newline"
        )
    for token in row:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"generate: prompt {n} holds {token!r}; expected int token ids - encode the text first")
        if not 0 <= token < V:
            raise ValueError(
                f"generate: prompt {n} holds token id {token}; expected ids in [0, {V}), the vocabulary of this model - "
                "was the text encoded with another tokenizer?"
            )
    if len(row) + max_new_tokens > limit:
        raise ValueError(
            f"generate: prompt {n} has {len(row)} tokens and max_new_tokens is {max_new_tokens}, together "
            f"{len(row) + max_new_tokens}, but block_size is {limit}; shorten the prompt or ask for at most "
            f"{max(0, limit - len(row))} tokens"
        )


@contextmanager
def for_generation(model: GPT) -> Any:
    """Evaluation mode without autograd; the training flag of every module comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in flags:
            module.training = training


def prefill(model: GPT, prompts: list[list[int]], copies: int, max_new_tokens: int) -> tuple[Tensor, KVCache]:
    """Run every prompt once and copy it into `copies` neighbouring rows of one cache.

    Each prompt runs by itself, without padding, so that a row computes what it computes alone.

    Returns:
        (logits of the last position (B * copies, V), cache of B * copies rows).
    """
    weight = model.wte.weight
    longest = max(map(len, prompts)) + max_new_tokens
    cache = KVCache(model.config, len(prompts) * copies, longest, weight.dtype, weight.device)
    logits = []
    for n, prompt in enumerate(prompts):
        T = len(prompt)
        one = KVCache(model.config, 1, T, weight.dtype, weight.device)
        logits.append(model(torch.tensor([prompt], device=weight.device), cache=one, last_only=True))
        rows = slice(n * copies, (n + 1) * copies)
        cache.k[:, rows, :, :T] = one.k
        cache.v[:, rows, :, :T] = one.v
        cache.lengths[rows] = T
    return torch.cat(logits).repeat_interleave(copies, 0), cache
