"""Beam search with the scores and the ending rules of transformers.  K beams, V vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptfast import rng
from gptfast.generation.config import GenerationConfig
from gptfast.generation.runner import LanguageModel, Sequences, beside
from gptfast.generation.sampling import NAN, NOTHING_LEFT, cut_vocabulary, processors, warp
from gptfast.generation.stopping import Stopping

NEVER = -math.inf  # the score of a beam that is not there
BLOCK = 256  # tokens of which `largest` looks at the best first


@dataclass
class Group:
    """The search of K beams from one prompt.

    first_stream: of the noise of its beams, where these are drawn.
    running: K sequences (new tokens only), best first, with their log-probabilities in `scores`.
    taken: the last tokens of the best K that no end token or stop string has ended.
    ended: at most K (score, new tokens), best first; the score is log-probability / length ** length_penalty.
    """

    K: int
    prompt: list[int]
    config: GenerationConfig
    stopping: Stopping
    first_stream: int = 0
    running: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.running = [[] for _ in range(self.K)]
        self.scores = [0.0] + [NEVER] * (self.K - 1)  # all beams start equal: only one of them counts

    def advance(self, logprobs: Tensor, taken: list[int]) -> list[int]:
        """Extend the beams by the next token's log-probabilities (K, V); returns the beam each new one comes from.

        Args:
            taken: the tokens that beams of earlier groups took in this step; each makes its token less likely.
        """
        V, length = logprobs.shape[-1], len(self.running[0]) + 1
        candidates = self._candidates(self._process(logprobs, taken))
        running: list[tuple[float, int, list[int]]] = []
        ended: list[tuple[float, list[int]]] = []
        taken_now: list[int] = []
        full = self.config.early_stopping is True and self._count_ended() == self.K
        for rank, (score, place) in enumerate(candidates):
            beam, token = divmod(place, V)
            sequence = [*self.running[beam], token]
            reason = self.stopping.reason(sequence)
            if reason != "stop":
                taken_now.append(token)
            if reason is None:
                running.append((score, beam, sequence))
            elif rank < self.K and not full:
                ended.append((score / length**self.config.length_penalty, sequence))
        self.ended = sorted(self.ended + ended, key=lambda e: e[0], reverse=True)[: self.K]
        running = sorted(running, key=lambda r: r[0], reverse=True)[: self.K]  # drawn ones come in the order of drawing
        if running:  # stop strings may have ended more beams than the candidates make up for
            running += [(NEVER, *running[0][1:])] * (self.K - len(running))
        self.taken = taken_now[: self.K]
        self.done = not running or not self._may_improve(running[0][0], length)
        self.scores = [score for score, _, _ in running]
        self.running = [sequence for _, _, sequence in running]
        return [beam for _, beam, _ in running]

    def _process(self, scores: Tensor, taken: list[int]) -> Tensor:
        """Log-probabilities (K, V) after everything that changes them."""
        scores = cut_vocabulary(scores, self.config)
        if taken:
            counts = torch.bincount(torch.tensor(taken, dtype=torch.int64, device="cpu"), minlength=scores.shape[-1])
            scores = scores - self.config.diversity_penalty * counts
        if changes := processors(self.config):
            rows = list(scores)
            for change in changes:
                rows = [change(row, self.prompt, new) for row, new in zip(rows, self.running, strict=True)]
            scores = torch.stack(rows)
        return warp(scores, self.config, least=max(2, 1 + len(self.config.eos_ids))) if self.config.draws else scores

    def _candidates(self, logprobs: Tensor) -> list[tuple[float, int]]:
        """(score, beam * V + token) of enough extensions to go on with if the best K all end: the best, or drawn ones.

        Those with the largest score + Gumbel noise are a draw without replacement (Kool et al., arXiv 1903.06059).
        """
        noisy, V = logprobs, logprobs.shape[-1]
        if self.config.draws:
            beams = torch.arange(self.K, device="cpu")
            position = torch.full_like(beams, len(self.prompt) + len(self.running[0]))
            noisy = logprobs + rng.gumbel_noise(V, self.config.seed or 0, position, self.first_stream + beams)
        scores = torch.tensor(self.scores, dtype=torch.float32, device="cpu")[:, None]
        keep = min(max(2, 1 + len(self.config.eos_ids)) * self.K, logprobs.numel())
        tokens = largest(noisy, min(keep, V))  # (K, keep): of each beam, as if all came from it
        best = (noisy.gather(1, tokens) + scores).flatten().topk(keep).indices
        total = (logprobs.gather(1, tokens) + scores).flatten()[best]
        places = (tokens + V * torch.arange(self.K, device="cpu")[:, None]).flatten()[best]
        return list(zip(total.tolist(), places.tolist(), strict=True))

    def _count_ended(self) -> int:
        return sum(score > NEVER for score, _ in self.ended)

    def _may_improve(self, best_running: float, length: int) -> bool:
        config = self.config
        if self._count_ended() < self.K:
            return True
        if config.early_stopping is True:
            return False
        at = config.max_new_tokens if config.early_stopping == "never" and config.length_penalty > 0 else length
        return best_running / at**config.length_penalty > self.ended[-1][0]


@dataclass
class Search:
    """The search from one prompt: its groups, each with as many rows of the model's sequences as it has beams."""

    groups: list[Group]
    rows: list[int]  # of the groups that are not done, in order

    def advance(self, logprobs: Tensor, sequences: Sequences) -> None:
        """One step of the groups that are not done, from the log-probabilities of all their rows."""
        taken: list[int] = []
        going, kept, K = [group for group in self.groups if not group.done], [], self.groups[0].K
        for n, group in enumerate(going):
            rows = self.rows[n * K : (n + 1) * K]
            parents = group.advance(logprobs[n * K : (n + 1) * K], taken)
            if group.done:
                for row in rows:
                    sequences.release(row)
            else:
                sequences.reorder(rows, [rows[parent] for parent in parents])
                kept += rows
            taken += group.taken
        self.rows = kept

    @property
    def last(self) -> list[int]:
        """The last token of each row."""
        return [sequence[-1] for group in self.groups if not group.done for sequence in group.running]

    def best(self, count: int) -> list[tuple[float, list[int]]]:
        """The best ended sequences of all groups."""
        ended = [found for group in self.groups for found in group.ended]
        return sorted(ended, key=lambda e: e[0], reverse=True)[:count]


def beam_search(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, stopping: Stopping, apart: bool = False
) -> tuple[list[list[int]], list[float]]:
    """The best `num_return_sequences` continuations of each prompt: prompt and new tokens, and their scores.

    apart: equal prompts get different draws.

    Each step takes the 2 K best extensions of a prompt's K beams (more with several end tokens); those of the first K
    that end are kept by their normalised score, and the best K that go on are the next beams.
    """
    searches, logits, sequences = _start(model, prompts, config, stopping, apart)
    while True:
        with beside(sequences):
            logprobs = _logprobs(logits).split([len(search.rows) for search in searches])
            for search, part in zip(searches, logprobs, strict=True):
                search.advance(part, sequences)
        rows = [row for search in searches for row in search.rows]
        if not rows:
            break
        logits = sequences.extend(rows, [[token] for search in searches for token in search.last])
    for search in searches:
        if search.best(1)[0][0] == NEVER:
            raise RuntimeError(NOTHING_LEFT)
    found = [
        (s, search.groups[0].prompt + new) for search in searches for s, new in search.best(config.num_return_sequences)
    ]
    return [row for _, row in found], [score for score, _ in found]


def _start(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, stopping: Stopping, apart: bool
) -> tuple[list[Search], Tensor, Sequences]:
    """Read every prompt once; returns the searches, the logits of all their rows, and the rows' sequences."""
    K, groups = config.num_beams, config.num_beam_groups
    longest = max(map(len, prompts)) + config.max_new_tokens
    sequences = model.sequences(len(prompts) * K, longest)
    searches, logits = [], []
    for n, prompt in enumerate(prompts):
        row, first = sequences.add()[0], n * K if apart else 0
        logits += [sequences.extend([row], [prompt])] * K
        rows = [row, *sequences.add(K - 1, like=row)]
        searches.append(Search([Group(K // groups, prompt, config, stopping, first) for _ in range(groups)], rows))
    return searches, torch.cat(logits), sequences


def _logprobs(logits: Tensor | list[Tensor]) -> Tensor:
    assert isinstance(logits, Tensor)  # one row of logits per sequence
    logprobs = logits.log_softmax(-1).cpu()
    if logprobs[:, 0].isnan().any():  # one nan makes all of its row nan
        raise RuntimeError(NAN)
    return logprobs


def largest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of each row of (K, V), in order: (K, count).

    They lie in the `count` blocks with the largest maxima, so that most values are looked at by a maximum alone, which
    is several times as fast as `topk`.
    """
    K, V = scores.shape
    blocks = V // BLOCK
    if blocks <= count:
        return scores.topk(count).indices
    best = scores[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1).topk(count).indices
    inside = (BLOCK * best[:, :, None] + torch.arange(BLOCK, device=scores.device)).flatten(1)  # (K, count * BLOCK)
    rest = torch.arange(blocks * BLOCK, V, device=scores.device).expand(K, -1)
    places = torch.cat([inside, rest], 1)
    return places.gather(1, scores.gather(1, places).topk(count).indices)
