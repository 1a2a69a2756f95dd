"""The next token of each row.  B rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.config import GenerationConfig
from gptfast.generation.processors import processors, warp
from gptfast.generation.sequences import Sequences

NAN = "generate: the logits hold nan - look for an overflow in the model"
NOTHING_LEFT = "generate: no token is left to choose, all are excluded - relax no_repeat_ngram_size or logit_bias"


@dataclass(frozen=True)
class Context:
    """What a row's next token depends on, besides its logits.

    Args:
        config: how it is chosen.
        stream: number of the return sequence.
        tokens: the sequence so far, with its prompt.
        prompt: how many of them are the prompt.
    """

    config: GenerationConfig
    stream: int
    tokens: list[int]
    prompt: int


def choose(logits: Tensor, contexts: Sequence[Context]) -> list[int | RuntimeError]:
    """The next token of each row, or what is wrong with its logits, (B, V) fp32."""
    scores = _process(logits, contexts)
    chosen: list[int | RuntimeError] = [_fault(top) or 0 for top in scores.amax(-1).tolist()]
    groups: dict[tuple, list[int]] = {}  # rows that one call of `sample` can serve
    for row, context in enumerate(contexts):
        if chosen[row] == 0:
            groups.setdefault(_sampling(context.config), []).append(row)
    for (temperature, top_k, top_p, min_p, seed), rows in groups.items():
        part = scores if len(rows) == len(contexts) else scores[rows] if len(rows) > 1 else scores[rows[0]][None]
        if min_p:  # ops.sample does not know it
            part = warp(part, contexts[rows[0]].config)
            temperature, top_k, top_p = 1.0, 0, 1.0
        tokens = ops.sample(
            part,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            position=_one_or_all([len(contexts[row].tokens) for row in rows]),
            stream=_one_or_all([contexts[row].stream for row in rows]),
        )
        for row, token in zip(rows, tokens.tolist(), strict=True):
            chosen[row] = token
    return chosen


def draw_inside(sequences: Sequences, rows: Sequence[int], logits: Tensor, contexts: Sequence[Context]) -> list | None:
    """As `choose`, on the model's own threads; None where they cannot, or the rows differ in what they ask for.

    Args:
        rows: of the sequences; logits[i] are those of the last position of rows[i].
    """
    wanted = {_sampling(context.config) for context in contexts}
    if len(wanted) > 1 or any(processors(context.config) or context.config.min_p for context in contexts):
        return None
    ((temperature, top_k, top_p, _, seed),) = wanted
    try:
        return sequences.draw(rows, logits, [context.stream for context in contexts], (temperature, top_k, top_p, seed))
    except RuntimeError:  # one of the rows has nan: `choose` tells which
        return None


def _one_or_all(values: list[int]) -> int | Tensor:
    """An int where it will do: every request may have a seed of its own, and tensors take longer to make and check."""
    return values[0] if len(values) == 1 else torch.tensor(values)


def _process(logits: Tensor, contexts: Sequence[Context]) -> Tensor:
    changes = [processors(context.config) for context in contexts]
    if not any(changes):
        return logits
    scores = logits.clone()  # the caller's stay as they are
    for n, context in enumerate(contexts):
        for change in changes[n]:
            scores[n] = change(scores[n], context.tokens[: context.prompt], context.tokens[context.prompt :])
    return scores


def _fault(top: float) -> RuntimeError | None:
    if math.isnan(top):
        return RuntimeError(NAN)
    if top == -math.inf:
        return RuntimeError(NOTHING_LEFT)
    return None


def _sampling(config: GenerationConfig) -> tuple[float, int, float, float, int]:
    if not config.draws:
        return 0.0, 0, 1.0, 0.0, 0
    return config.temperature, config.top_k, config.top_p, config.min_p, config.seed
