"""Prompts: checked, and run through the model into one cache.  B rows, T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.generation.config import GenerationConfig
from gptfast.models.kv_cache import KVCache

if TYPE_CHECKING:
    from gptfast.models import GPT


def read_prompts(ids: Any, model: GPT, config: GenerationConfig) -> list[list[int]]:
    """The prompts as lists of ids.

    Args:
        ids: (B, T) or (T,) integer tensor, a list of id lists (or 1-D tensors) of any lengths, or one list of ids.
        model: whose vocabulary and block_size they must fit.
        config: whose max_new_tokens must fit behind them, and its eos_token_id the vocabulary.
    Raises:
        TypeError, ValueError: not that, empty, outside the vocabulary, or too long.
    """
    V = model.config.vocab_size
    for token in config.eos_ids:
        if token >= V:
            raise ValueError(
                f"generate: eos_token_id is {token}; expected ids in [0, {V}), the vocabulary of this model, or None - "
                "a sequence could never end with it"
            )
    rows = [_read_row(n, row) for n, row in enumerate(_split(ids))]
    if not rows:
        raise ValueError("generate: ids holds no prompts; give at least one")
    for n, row in enumerate(rows):
        _check_row(n, row, V, model.config.block_size, config.max_new_tokens)
    return rows


def _split(ids: Any) -> Sequence[Any]:
    """One entry per prompt."""
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
            raise TypeError(
                f"generate: ids is a {ids.dtype} tensor of shape {tuple(ids.shape)}; expected (B, T) token ids"
            )
        return ids.tolist() if ids.dim() == 2 else [ids.tolist()]
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise TypeError(f"generate: ids is a {type(ids).__name__}; expected a (B, T) tensor or a list of id lists")
    return [ids] if ids and isinstance(ids[0], Integral) else ids


def _read_row(n: int, row: Any) -> list[int]:
    row = row.tolist() if isinstance(row, Tensor) else row
    if not isinstance(row, Sequence):
        raise TypeError(f"generate: prompt {n} is {row!r}; expected a list of token ids")
    for token in row:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise TypeError(f"generate: prompt {n} holds {token!r}; expected int token ids - encode the text first")
    return [int(token) for token in row]


def _check_row(n: int, row: list[int], V: int, limit: int, max_new_tokens: int) -> None:
    if not row:
        raise ValueError(
            f"generate: prompt {n} is empty; give at least one token, such as the end-of-text token or a newline"
        )
    for token in row:
        if not 0 <= token < V:
            raise ValueError(
                f"generate: prompt {n} holds token id {token}; expected ids in [0, {V}), the vocabulary of this model - "
                "was the text encoded with another tokenizer?"
            )
    if len(row) + max_new_tokens > limit:
        raise ValueError(
            f"generate: prompt {n} has {len(row)} tokens and max_new_tokens is {max_new_tokens}, together "
            f"{len(row) + max_new_tokens}, but block_size is {limit}; {_remedy(len(row), limit, max_new_tokens)}"
        )


def _remedy(length: int, limit: int, max_new_tokens: int) -> str:
    parts = []
    if max_new_tokens < limit:
        parts.append(f"shorten the prompt to {limit - max_new_tokens} or fewer")
    if length < limit:
        parts.append(f"ask for at most {limit - length} new tokens")
    return " or ".join(parts) or f"a prompt and its new tokens together are at most {limit}"


@contextmanager
def for_generation(model: GPT) -> Iterator[None]:
    """Evaluation mode without autograd; the training flag of every module comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


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
