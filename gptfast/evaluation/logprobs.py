"""Log-probabilities of the tokens of windows, by torch or by a runner, without the logits of a window in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.runner import LanguageModel, Runner, single_threaded_torch

ROWS = 8  # windows of a forward pass
PIECE = 128  # positions whose logits are held at a time: 26 MB for GPT-2

Scorer = Callable[[Sequence[tuple[np.ndarray, int]]], list[np.ndarray]]


def scorer(model: Any, context: int) -> Scorer:
    """A function that scores windows: [(ids, first), …] -> log p(ids[t] | ids[:t]) for t from `first` to the end, float64.

    Args:
        model: a GPT, which runs in torch with its own forward pass; a compiled GPT, which runs in the native engine.
        context: most tokens of a window.
    """
    return _in_torch(model) if isinstance(model, torch.nn.Module) else _by_runner(model, context)


def _in_torch(model: Any) -> Scorer:
    device = next(model.parameters()).device

    @torch.inference_mode()
    def run(rows: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        if not model.has_plain_head():  # one with an adapter, a soft cap, or one of the user's
            return [_by_logits(model(_ids(tokens[:-1], device)[None])[0], tokens, first) for tokens, first in rows]
        longest = max(len(tokens) for tokens, _ in rows) - 1
        ids = torch.zeros(
            len(rows), longest, dtype=torch.int64, device=device
        )  # causal attention never sees what is right
        for row, (tokens, _) in enumerate(rows):
            ids[row, : len(tokens) - 1] = _ids(tokens[:-1], device)
        hidden = model.hidden_states(ids)
        needed = torch.cat([hidden[row, first - 1 : len(tokens) - 1] for row, (tokens, first) in enumerate(rows)])
        wanted = torch.cat([_ids(tokens[first:], device) for tokens, first in rows])
        logprobs = ops.linear_logprobs(needed, model.lm_head.weight, wanted).double().cpu().numpy()
        return np.split(logprobs, np.cumsum([len(tokens) - first for tokens, first in rows])[:-1])

    return run


def _by_logits(logits: Tensor, tokens: np.ndarray, first: int) -> np.ndarray:
    """Log-probabilities of tokens[first:]; the last rows of `logits` are those that predict them."""
    wanted = _ids(tokens[first:], logits.device)
    return -ops.cross_entropy(logits[-len(wanted) :], wanted, reduction="none").double().cpu().numpy()


def _ids(tokens: np.ndarray, device: Any) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def _by_runner(model: LanguageModel, context: int) -> Scorer:
    runner = model.runner(1, context)

    def run(rows: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        with single_threaded_torch(runner), torch.inference_mode():
            return [_one_window(runner, tokens, first) for tokens, first in rows]

    return run


def _one_window(runner: Runner, tokens: np.ndarray, first: int) -> np.ndarray:
    """The tokens before `first` need no logits."""
    (slot,) = runner.allocate()
    try:
        if first > 1:
            runner.extend([slot], [tokens[: first - 1].tolist()])
        parts = []
        for start in range(first - 1, len(tokens) - 1, PIECE):
            read = tokens[start : start + PIECE + 1]
            logits = runner.extend([slot], [read[:-1].tolist()], last_only=False)[0]
            parts.append(_by_logits(logits, read, 1))
        return np.concatenate(parts)
    finally:
        runner.free(slot)
