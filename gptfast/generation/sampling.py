"""The next token of each row: changes of the scores, and the draw.  B rows, V vocabulary.

Names, meanings and order are those of transformers' logits processors, the presence and frequency penalties OpenAI's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.config import GenerationConfig
from gptfast.generation.runner import Sampling, Sequences
from gptfast.ops.reference import kept_tokens

NAN = "generate: the logits hold nan - look for an overflow in the model"
NOTHING_LEFT = "generate: no token is left to choose, all are excluded - relax no_repeat_ngram_size or logit_bias"
FAULTS = {-1: NAN, -2: NOTHING_LEFT}  # what a draw gives where there is no token

Processor = Callable[[Tensor, list[int], list[int]], Tensor]  # (V,), the prompt and the tokens behind it -> (V,)


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


def processors(config: GenerationConfig) -> list[Processor]:
    """What `config` asks for, in the order in which it is applied; drawing's cuts are `warp`'s."""
    wanted: list[Processor] = []
    if config.logit_bias:
        tokens, values = list(config.logit_bias), list(config.logit_bias.values())
        wanted.append(lambda scores, *_: _at(scores, tokens, lambda x: x + x.new_tensor(values)))
    if config.repetition_penalty != 1:
        wanted.append(lambda scores, prompt, new: penalise(scores, prompt + new, config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        wanted.append(
            lambda scores, _, new: penalise_counts(scores, new, config.presence_penalty, config.frequency_penalty)
        )
    if config.no_repeat_ngram_size:
        wanted.append(lambda scores, prompt, new: ban_repeated(scores, prompt + new, config.no_repeat_ngram_size))
    if config.suppress_tokens:
        banned = list(config.suppress_tokens)
        wanted.append(lambda scores, *_: _at(scores, banned, lambda x: torch.full_like(x, -math.inf)))
    return wanted


def cut_vocabulary(scores: Tensor, config: GenerationConfig) -> Tensor:
    """The scores, (…, V), in which ids beyond the usable vocabulary are -inf."""
    if not config.usable_vocab:
        return scores
    scores = scores.clone()
    scores[..., config.usable_vocab :] = -math.inf
    return scores


def penalise(scores: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Tokens that were seen become less likely: Keskar et al., arXiv 1909.05858, section 4.1."""
    return _at(scores, list(set(seen)), lambda x: torch.where(x < 0, x * penalty, x / penalty))


def penalise_counts(scores: Tensor, new: Sequence[int], presence: float, frequency: float) -> Tensor:
    """scores - presence * [count > 0] - frequency * count: OpenAI's API reference, "frequency and presence penalties"."""
    counts = Counter(new)
    penalties = [presence + frequency * count for count in counts.values()]
    return _at(scores, list(counts), lambda x: x - x.new_tensor(penalties))


def ban_repeated(scores: Tensor, seen: Sequence[int], n: int) -> Tensor:
    """No token that would complete n tokens in a row that were there before."""
    if len(seen) < n:
        return scores
    seen = list(seen)
    start = seen[len(seen) - n + 1 :]  # the n - 1 last tokens
    banned = {seen[i + n - 1] for i in range(len(seen) - n + 1) if seen[i : i + n - 1] == start}
    return _at(scores, sorted(banned), lambda x: torch.full_like(x, -math.inf))


def _at(scores: Tensor, tokens: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of the scores in which those of `tokens` (distinct) are changed."""
    if not tokens:
        return scores
    index = torch.tensor(tokens, dtype=torch.int64, device=scores.device)
    return scores.index_copy(0, index, change(scores[index]))


def warp(scores: Tensor, config: GenerationConfig, least: int = 1) -> Tensor:
    """(B, V) divided by the temperature, and -inf where top_k, top_p or min_p exclude a token.

    Args:
        least: so many tokens stay in any case; beams need more than can end.
    """
    top_k = max(config.top_k, least) if config.top_k else 0
    kept = kept_tokens(scores, config.temperature, top_k, config.top_p)
    scores = scores / config.temperature
    if config.min_p:
        kept &= scores >= scores.amax(-1, keepdim=True) + math.log(config.min_p)
    if least > 1:
        best = scores.topk(min(least, scores.shape[-1])).indices
        kept.scatter_(-1, best, torch.ones_like(best, dtype=torch.bool))
    return scores.masked_fill(~kept, -math.inf)
