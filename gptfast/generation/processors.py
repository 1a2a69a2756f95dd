"""What changes scores before a token is chosen: functions (scores, prompt, new tokens) -> scores.  B rows, V vocabulary.

Names, meanings and order are those of transformers' logits processors, the presence and frequency penalties OpenAI's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptfast.generation.config import GenerationConfig
from gptfast.ops.reference import kept_tokens

Processor = Callable[[Tensor, list[int], list[int]], Tensor]  # (V,), the prompt and the tokens behind it -> (V,)


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
