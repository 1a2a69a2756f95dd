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
from gptfast.generation.sequences import Sampling, Sequences

NAN = "generate: the logits hold nan - look for an overflow in the model"
NOTHING_LEFT = "generate: no token is left to choose, all are excluded - relax no_repeat_ngram_size or logit_bias"
FAULTS = {-1: NAN, -2: NOTHING_LEFT}  # what a draw gives where there is no token


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


def choose(logits: Tensor, contexts: Sequence[Context], sequences: Sequences | None = None) -> list[int | RuntimeError]:
    """The next token of each row, or what is wrong with its logits, (B, V) fp32.

    Args:
        sequences: of the model, which may draw on threads of its own.
    """
    scores = _process(logits, contexts)
    samplings = [sampling_of(context) for context in contexts]
    positions = [len(context.tokens) for context in contexts]
    drawn = sequences.draw(scores, samplings, positions) if sequences is not None else None
    if drawn is None:
        drawn = _draw(scores, samplings, positions)
    return [token if token >= 0 else RuntimeError(FAULTS[token]) for token in drawn]


def _draw(scores: Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """As `Sequences.draw`, by `ops.sample`."""
    vocabularies = {sampling.vocab for sampling in samplings}
    if len(vocabularies) > 1:
        scores = torch.stack([_cut(row, sampling.vocab) for row, sampling in zip(scores, samplings, strict=True)])
    elif vocab := vocabularies.pop():
        scores = scores[:, :vocab]
    drawn = [_fault(top) for top in scores.amax(-1).tolist()]
    groups: dict[tuple[float, int, float, int], list[int]] = {}  # rows that one call can serve
    for row, sampling in enumerate(samplings):
        if not drawn[row]:
            groups.setdefault(sampling[:4], []).append(row)
    for (temperature, top_k, top_p, seed), rows in groups.items():
        part = scores if len(rows) == len(samplings) else scores[rows] if len(rows) > 1 else scores[rows[0]][None]
        tokens = ops.sample(
            part,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            position=_one_or_all([positions[row] for row in rows]),
            stream=_one_or_all([samplings[row].stream for row in rows]),
        )
        for row, token in zip(rows, tokens.tolist(), strict=True):
            drawn[row] = token
    return drawn


def _cut(row: Tensor, vocab: int) -> Tensor:
    return torch.cat([row[:vocab], torch.full_like(row[vocab:], -math.inf)]) if vocab else row


def _one_or_all(values: list[int]) -> int | Tensor:
    """An int where it will do: every request may have a seed of its own, and tensors take longer to make and check."""
    return values[0] if len(values) == 1 else torch.tensor(values, dtype=torch.int64, device="cpu")


def _process(logits: Tensor, contexts: Sequence[Context]) -> Tensor:
    """The scores to draw from, with all that `ops.sample` does not know; min_p comes with the other cuts."""
    changes = [processors(context.config) for context in contexts]
    cuts: dict[tuple[float, int, float, float], list[int]] = {}
    for n, config in enumerate(context.config for context in contexts):
        if config.draws and config.min_p:
            cuts.setdefault((config.temperature, config.top_k, config.top_p, config.min_p), []).append(n)
    if not any(changes) and not cuts:
        return logits
    scores = logits.clone()  # the caller's stay as they are
    for n, context in enumerate(contexts):
        for change in changes[n]:
            scores[n] = change(scores[n], context.tokens[: context.prompt], context.tokens[context.prompt :])
        if context.config.usable_vocab:
            scores[n, context.config.usable_vocab :] = -math.inf
    for rows in cuts.values():
        part = scores[rows]
        scores[rows] = part.where(part.isnan(), warp(part, contexts[rows[0]].config))  # nan must not be cut away
    return scores


def takes_logits_as_they_are(config: GenerationConfig) -> bool:
    """Whether a draw needs nothing but logits and a `Sampling`."""
    return not (processors(config) or (config.draws and config.min_p))


def sampling_of(context: Context) -> Sampling:
    """How the context's next token is drawn from what `choose` has made of its logits."""
    config, stream, vocab = context.config, context.stream, context.config.usable_vocab
    if not config.draws:
        return Sampling(0.0, 0, 1.0, 0, stream, vocab)
    if config.min_p:  # `_process` has made all cuts
        return Sampling(1.0, 0, 1.0, config.seed or 0, stream, vocab)
    return Sampling(config.temperature, config.top_k, config.top_p, config.seed or 0, stream, vocab)


def _fault(top: float) -> int:
    return -1 if math.isnan(top) else -2 if top == -math.inf else 0
