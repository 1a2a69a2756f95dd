"""Log-probabilities of the tokens of windows, by torch or by a runner, without the logits of a window in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation import TorchRunner
from gptfast.generation.runner import Runner, single_threaded_torch
from gptfast.nn.transformer import Transformer

ROWS = 8  # windows of a forward pass
PIECE = 128  # positions whose logits are held at a time: 26 MB for GPT-2
LONG = 8192  # tokens of windows that torch reads at once; a longer window is read in parts through a cache

Scorer = Callable[[Sequence[tuple[np.ndarray, int]]], list[np.ndarray]]


def scorer(model: Any, context: int) -> Scorer:
    """A function that scores windows: [(ids, first), …] -> log p(ids[t] | ids[:t]) for t from `first` to the end, float64.

    Args:
        model: a GPT, which runs in torch with its own forward pass; a compiled GPT, which runs in the native engine.
        context: most tokens of a window.
    """
    if not isinstance(model, torch.nn.Module):
        return _by_runner(model.runner(1, context))
    if context > LONG and isinstance(model, Transformer):
        return _by_runner(TorchRunner(model, 1, context))
    return _in_torch(model, max(1, LONG // context))


def _in_torch(model: Any, most: int) -> Scorer:
    """most: windows of a forward pass."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def some(rows: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
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

    def run(rows: Sequence[tuple[np.ndarray, int]]) -> list[np.ndarray]:
        return [found for start in range(0, len(rows), most) for found in some(rows[start : start + most])]

    return run


def _by_logits(logits: Tensor, tokens: np.ndarray, first: int) -> np.ndarray:
    """Log-probabilities of tokens[first:]; the last rows of `logits` are those that predict them."""
    wanted = _ids(tokens[first:], logits.device)
    return -ops.cross_entropy(logits[-len(wanted) :], wanted, reduction="none").double().cpu().numpy()


def _ids(tokens: np.ndarray, device: Any) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64)).to(device)


def _by_runner(runner: Runner) -> Scorer:
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
