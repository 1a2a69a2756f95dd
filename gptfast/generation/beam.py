"""Beam search with the scores and the ending rules of transformers.  K beams, V vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast.generation.config import GenerationConfig
from gptfast.generation.prompts import prefill

if TYPE_CHECKING:
    from gptfast.models import GPT

NEVER = -math.inf  # the score of a beam that is not there


@dataclass
class Search:
    """The search from one prompt.

    running: K sequences (new tokens only), best first, with their log-probabilities in `scores`.
    ended: at most K (score, new tokens), best first; the score is log-probability / length ** length_penalty.
    """

    prompt: list[int]
    config: GenerationConfig
    running: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        K = self.config.num_beams
        self.running = [[] for _ in range(K)]
        self.scores = [0.0] + [NEVER] * (K - 1)  # all beams start equal: only one of them counts

    def advance(self, logprobs: Tensor) -> list[int]:
        """Extend the beams by the next token's log-probabilities (K, V); returns the beam each new one comes from."""
        config, K = self.config, self.config.num_beams
        V = logprobs.shape[-1]
        total = (logprobs + torch.tensor(self.scores)[:, None]).flatten()
        keep = min(max(2, 1 + len(config.eos_ids)) * K, total.numel())  # enough to go on with if the best K all end
        values, places = total.topk(keep)
        length = len(self.running[0]) + 1
        running: list[tuple[float, int, list[int]]] = []
        ended: list[tuple[float, list[int]]] = []
        full = config.early_stopping is True and self._count_ended() == K
        for rank, (score, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            beam, token = divmod(place, V)
            sequence = [*self.running[beam], token]
            if token not in config.eos_ids and length < config.max_new_tokens:
                running.append((score, beam, sequence))
            elif rank < K and not full:
                ended.append((score / length**config.length_penalty, sequence))
        self.ended = sorted(self.ended + ended, key=lambda e: e[0], reverse=True)[:K]
        running = running[:K]
        self.done = not running or not self._may_improve(running[0][0], length)
        self.scores = [score for score, _, _ in running]
        self.running = [sequence for _, _, sequence in running]
        return [beam for _, beam, _ in running]

    def _count_ended(self) -> int:
        return sum(score > NEVER for score, _ in self.ended)

    def _may_improve(self, best_running: float, length: int) -> bool:
        config = self.config
        if self._count_ended() < config.num_beams:
            return True
        if config.early_stopping is True:
            return False
        at = config.max_new_tokens if config.early_stopping == "never" and config.length_penalty > 0 else length
        return best_running / at**config.length_penalty > self.ended[-1][0]


def beam_search(model: GPT, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """The best `num_return_sequences` continuations of each prompt: prompt and new tokens.

    Each step takes the 2 K best extensions of a prompt's K beams (more with several end tokens); those of the first K
    that end are kept by their normalised score, and the best K that go on are the next beams.
    """
    K = config.num_beams
    searches = [Search(prompt, config) for prompt in prompts]
    logits, cache = prefill(model, prompts, K, config.max_new_tokens)
    active = searches
    while True:
        logprobs = logits.float().log_softmax(-1).cpu().view(len(active), K, -1)
        if logprobs.isnan().any():
            raise RuntimeError("generate: the logits hold nan - look for an overflow in the model")
        parents = [search.advance(part) for search, part in zip(active, logprobs, strict=True)]
        rows = [n * K + beam for n, beams in enumerate(parents) if not active[n].done for beam in beams]
        active = [search for search in active if not search.done]
        if not active:
            return [s.prompt + sequence for s in searches for _, sequence in s.ended[: config.num_return_sequences]]
        cache.reorder(torch.tensor(rows, device=logits.device))
        last = [[sequence[-1]] for search in active for sequence in search.running]
        logits = model(torch.tensor(last, device=logits.device), cache=cache, last_only=True)
