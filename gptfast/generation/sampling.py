"""Sampling: the next token of each sequence from its logits.  B rows of logits, V vocabulary.

Processors change the logits first. Their names, meanings and order are those of transformers' logits processors; the
presence and frequency penalties are OpenAI's. `sample_rows` then draws the tokens with `ops.sample`. What a new option changes
before the temperature goes into `processors`; what it excludes after the temperature goes into `warp`, and its name into `CUTS`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.config import LEAST_TEMPERATURE, GenerationConfig
from gptfast.ops.reference import kept_tokens

NAN = "generate: the logits hold nan - look for an overflow in the model"
NOTHING_LEFT = "generate: no token is left to choose, all are excluded - relax no_repeat_ngram_size or logit_bias"
SAMPLING_ERRORS = {-1: NAN, -2: NOTHING_LEFT}  # error codes that are returned instead of a token
CUTS = ("min_p",)  # options of `warp` that `ops.sample` does not have; 0: off

Processor = Callable[[Tensor, list[int], list[int]], Tensor]  # scores (V,), prompt, new tokens -> scores (V,)


class SamplingParams(NamedTuple):
    """How the next token of a sequence is drawn; see `gptfast.ops.sample`.

    vocab: only the first `vocab` ids may be drawn; 0: all.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    stream: int
    vocab: int = 0


@dataclass(frozen=True)
class SamplingContext:
    """What the next token of a sequence depends on, besides its logits.

    Args:
        config: the options of the request.
        stream: Philox stream of the sequence, in [0, 2**32).
        tokens: prompt and new tokens.
        prompt_len: number of prompt tokens.
        allowed: of the new tokens, (V,) bool: the tokens that may follow; None: all.
    """

    config: GenerationConfig
    stream: int
    tokens: list[int]
    prompt_len: int
    allowed: Callable[[Sequence[int]], Tensor] | None = None

    @property
    def params(self) -> SamplingParams:
        """How the token is drawn from processed logits."""
        config, vocab = self.config, self.config.usable_vocab
        if not config.is_sampling:
            return SamplingParams(0.0, 0, 1.0, 0, self.stream, vocab)
        if cuts_here(config):  # `_process` has applied temperature, top_k, top_p and the cuts
            return SamplingParams(1.0, 0, 1.0, config.seed or 0, self.stream, vocab)
        return SamplingParams(config.temperature, config.top_k, config.top_p, config.seed or 0, self.stream, vocab)


Sampler = Callable[[Tensor, Sequence[SamplingParams], Sequence[int]], list[int]]  # as `sample_rows`


def choose(logits: Tensor, contexts: Sequence[SamplingContext], sample: Sampler) -> list[int | RuntimeError]:
    """The next token of each row of logits, (B, V) fp32, or an error where there is none.

    Args:
        sample: draws from the processed logits: `sample_rows`, or the `sample` of a runner.
    """
    scores = _process(logits, contexts)
    drawn = sample(scores, [context.params for context in contexts], [len(context.tokens) for context in contexts])
    return [token if token >= 0 else RuntimeError(SAMPLING_ERRORS[token]) for token in drawn]


def sample_rows(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Draw a token from each row of logits, (B, V) fp32, with `ops.sample`: one call for all rows with equal parameters.

    Args:
        params: sampling parameters of each row.
        positions: position of each token in its sequence.
    Returns:
        The tokens. A negative number is a key of `SAMPLING_ERRORS`: -1 where a row holds nan, -2 where it is all -inf.
    """
    vocabularies = {row.vocab for row in params}
    if len(vocabularies) > 1:
        logits = torch.stack([_cut(row, one.vocab) for row, one in zip(logits, params, strict=True)])
    elif vocab := vocabularies.pop():
        logits = logits[:, :vocab]
    drawn = [_error_code(largest) for largest in logits.amax(-1).tolist()]
    groups: dict[tuple[float, int, float, int], list[int]] = {}
    for row, one in enumerate(params):
        if not drawn[row]:
            groups.setdefault(one[:4], []).append(row)
    for (temperature, top_k, top_p, seed), rows in groups.items():
        part = logits if len(rows) == len(params) else logits[rows] if len(rows) > 1 else logits[rows[0]][None]
        tokens = ops.sample(
            part,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            position=_int_or_tensor([positions[row] for row in rows]),
            stream=_int_or_tensor([params[row].stream for row in rows]),
        )
        for row, token in zip(rows, tokens.tolist(), strict=True):
            drawn[row] = token
    return drawn


def _cut(row: Tensor, vocab: int) -> Tensor:
    return torch.cat([row[:vocab], torch.full_like(row[vocab:], -math.inf)]) if vocab else row


def _error_code(largest: float) -> int:
    return -1 if math.isnan(largest) else -2 if largest == -math.inf else 0


def _int_or_tensor(values: list[int]) -> int | Tensor:
    """An int for a single row: tensors take longer to make and to check, and each request may have its own seed."""
    return values[0] if len(values) == 1 else torch.tensor(values, dtype=torch.int64, device="cpu")


def needs_only_logits(config: GenerationConfig) -> bool:
    """Whether a token is drawn from the logits as they are: no option needs the earlier tokens or other scores."""
    return not (processors(config) or cuts_here(config))


def cuts_here(config: GenerationConfig) -> bool:
    """Whether the distribution is cut by `warp`, and not by `ops.sample`."""
    return config.is_sampling and any(getattr(config, name) for name in CUTS)


def _process(logits: Tensor, contexts: Sequence[SamplingContext]) -> Tensor:
    """The logits after all processors and `CUTS`; temperature, top_k and top_p alone are left to `ops.sample`."""
    changes = [processors(context.config) for context in contexts]
    cut: dict[tuple[float, ...], list[int]] = {}
    for n, config in enumerate(context.config for context in contexts):
        if cuts_here(config):
            cut.setdefault(
                tuple(getattr(config, name) for name in ("temperature", "top_k", "top_p", *CUTS)), []
            ).append(n)
    if not any(changes) and not cut and all(context.allowed is None for context in contexts):
        return logits
    scores = logits.clone()  # the caller's logits stay unchanged
    for n, context in enumerate(contexts):
        for change in changes[n]:
            prompt, new = context.tokens[: context.prompt_len], context.tokens[context.prompt_len :]
            scores[n] = change(scores[n], prompt, new)
        if context.config.usable_vocab:
            scores[n, context.config.usable_vocab :] = -math.inf
        if context.allowed is not None:
            mask = context.allowed(context.tokens[context.prompt_len :]).to(scores.device)
            scores[n] = scores[n].where(mask | scores[n].isnan(), -math.inf)  # nan must stay visible
    for rows in cut.values():
        part = scores[rows]
        scores[rows] = part.where(part.isnan(), warp(part, contexts[rows[0]].config))  # nan must stay visible
    return scores


def probabilities(logits: Tensor, context: SamplingContext) -> Tensor:
    """The distribution (V,) from which `choose` draws the next token, from logits (V,)."""
    scores = _process(logits[None], [context])[0]
    if not context.config.is_sampling:
        return torch.zeros_like(scores).index_fill(0, scores.argmax(), 1.0)
    return (scores if cuts_here(context.config) else warp(scores[None], context.config)[0]).softmax(-1)


def processors(config: GenerationConfig) -> list[Processor]:
    """The processors that `config` asks for, in the order in which they are applied."""
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
    """Scores, (…, V), with -inf for the ids beyond the usable vocabulary."""
    if not config.usable_vocab:
        return scores
    scores = scores.clone()
    scores[..., config.usable_vocab :] = -math.inf
    return scores


def penalise(scores: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Make the tokens in `seen` less likely: Keskar et al., arXiv 1909.05858, section 4.1."""
    return _at(scores, list(set(seen)), lambda x: torch.where(x < 0, x * penalty, x / penalty))


def penalise_counts(scores: Tensor, new: Sequence[int], presence: float, frequency: float) -> Tensor:
    """scores - presence * [count > 0] - frequency * count: OpenAI's API reference, "frequency and presence penalties"."""
    counts = Counter(new)
    penalties = [presence + frequency * count for count in counts.values()]
    return _at(scores, list(counts), lambda x: x - x.new_tensor(penalties))


def ban_repeated(scores: Tensor, seen: Sequence[int], n: int) -> Tensor:
    """Exclude every token that would complete an n-gram that `seen` already contains."""
    if len(seen) < n:
        return scores
    seen = list(seen)
    start = seen[len(seen) - n + 1 :]  # the last n - 1 tokens
    banned = {seen[i + n - 1] for i in range(len(seen) - n + 1) if seen[i : i + n - 1] == start}
    return _at(scores, sorted(banned), lambda x: torch.full_like(x, -math.inf))


def _at(scores: Tensor, tokens: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of the scores with those of `tokens` (distinct) changed."""
    if not tokens:
        return scores
    index = torch.tensor(tokens, dtype=torch.int64, device=scores.device)
    return scores.index_copy(0, index, change(scores[index]))


def warp(scores: Tensor, config: GenerationConfig, least: int = 1) -> Tensor:
    """Scores (B, V) divided by the temperature, with -inf for the tokens that top_k, top_p or one of `CUTS` excludes.

    Args:
        least: number of tokens that are always kept; beam search needs more than can end.
    """
    top_k = max(config.top_k, least) if config.top_k else 0
    kept = kept_tokens(scores, config.temperature, top_k, config.top_p)
    scores = over_temperature(scores, config.temperature)
    if config.min_p:
        kept &= scores >= scores.amax(-1, keepdim=True) + math.log(config.min_p)
    if least > 1:
        best = scores.topk(min(least, scores.shape[-1])).indices
        kept.scatter_(-1, best, torch.ones_like(best, dtype=torch.bool))
    return scores.masked_fill(~kept, -math.inf)


def over_temperature(scores: Tensor, temperature: float) -> Tensor:
    """scores / temperature, (…, V). A row whose largest quotient is beyond the range of fp32 is shifted: its best is 0."""
    temperature = max(temperature, LEAST_TEMPERATURE)  # less is 0 in fp32, or nearly
    top = scores.amax(-1, keepdim=True)
    beyond = top.isfinite() & ((top / temperature) == math.inf)
    return (scores - torch.where(beyond, top, 0.0)) / temperature
