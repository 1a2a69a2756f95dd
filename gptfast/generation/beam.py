"""Beam search with the scores and the ending rules of transformers.  K beams, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptfast import rng
from gptfast.generation.config import GenerationConfig
from gptfast.generation.runner import Runner, single_threaded_torch
from gptfast.generation.sampling import NAN, NOTHING_LEFT, cut_vocabulary, processors, warp
from gptfast.generation.stopping import Stopping

NEVER = -math.inf  # score of a beam that does not exist
BLOCK = 256  # scores of a block, of which `largest` compares the maxima first


@dataclass
class Group:
    """The search of K beams from one prompt.

    first_stream: Philox stream of the noise of the first beam; used where beams are sampled.
    running: K sequences (new tokens only), best first, with their log-probabilities in `scores`.
    taken: last tokens of the best K beams that have not ended.
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
        self.scores = [0.0] + [NEVER] * (self.K - 1)  # all beams are equal at the start: only one counts

    def advance(self, logprobs: Tensor, taken: list[int]) -> list[int]:
        """Extend the beams by one token; returns for each new beam the number of the beam it continues.

        Args:
            logprobs: log-probabilities of the next token of each beam, (K, V).
            taken: tokens that beams of earlier groups took in this step; each makes its token less likely.
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
        running = sorted(running, key=lambda r: r[0], reverse=True)[
            : self.K
        ]  # sampled ones are in order of score + noise
        if running:  # stop strings may end more beams than there are spare candidates
            running += [(NEVER, *running[0][1:])] * (self.K - len(running))
        self.taken = taken_now[: self.K]
        self.done = not running or not self._may_improve(running[0][0], length)
        self.scores = [score for score, _, _ in running]
        self.running = [sequence for _, _, sequence in running]
        return [beam for _, beam, _ in running]

    def _process(self, scores: Tensor, taken: list[int]) -> Tensor:
        """Log-probabilities (K, V) after all processors."""
        scores = cut_vocabulary(scores, self.config)
        if taken:
            counts = torch.bincount(torch.tensor(taken, dtype=torch.int64, device="cpu"), minlength=scores.shape[-1])
            scores = scores - self.config.diversity_penalty * counts
        if changes := processors(self.config):
            rows = list(scores)
            for change in changes:
                rows = [change(row, self.prompt, new) for row, new in zip(rows, self.running, strict=True)]
            scores = torch.stack(rows)
        return (
            warp(scores, self.config, least=max(2, 1 + len(self.config.eos_ids))) if self.config.is_sampling else scores
        )

    def _candidates(self, logprobs: Tensor) -> list[tuple[float, int]]:
        """(score, beam * V + token) of the best extensions, or of sampled ones; enough of them if the best K all end.

        Those with the largest score + Gumbel noise are a sample without replacement (Kool et al., arXiv 1903.06059).
        """
        noisy, V = logprobs, logprobs.shape[-1]
        if self.config.is_sampling:
            beams = torch.arange(self.K, device="cpu")
            position = torch.full_like(beams, len(self.prompt) + len(self.running[0]))
            noisy = logprobs + rng.gumbel_noise(V, self.config.seed or 0, position, self.first_stream + beams)
        scores = torch.tensor(self.scores, dtype=torch.float32, device="cpu")[:, None]
        keep = min(max(2, 1 + len(self.config.eos_ids)) * self.K, logprobs.numel())
        tokens = largest(noisy, min(keep, V))  # (K, keep): the best of each beam
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
    """The search from one prompt: groups of beams, and a slot of the runner for each beam."""

    groups: list[Group]
    slots: list[int]  # of the groups that are not done, in order

    def advance(self, logprobs: Tensor, runner: Runner) -> None:
        """One step of the groups that are not done, from the log-probabilities of all their beams."""
        taken: list[int] = []
        going, kept, K = [group for group in self.groups if not group.done], [], self.groups[0].K
        for n, group in enumerate(going):
            slots = self.slots[n * K : (n + 1) * K]
            parents = group.advance(logprobs[n * K : (n + 1) * K], taken)
            if group.done:
                for slot in slots:
                    runner.free(slot)
            else:
                runner.copy(slots, [slots[parent] for parent in parents])
                kept += slots
            taken += group.taken
        self.slots = kept

    @property
    def last(self) -> list[int]:
        """The last token of each running beam."""
        return [sequence[-1] for group in self.groups if not group.done for sequence in group.running]

    def best(self, count: int) -> list[tuple[float, list[int]]]:
        """The best ended sequences of all groups."""
        ended = [found for group in self.groups for found in group.ended]
        return sorted(ended, key=lambda e: e[0], reverse=True)[:count]


def beam_search(
    runner: Runner,
    prompts: list[list[int]],
    config: GenerationConfig,
    stopping: Stopping,
    apart: bool = False,
    adapters: Sequence[str | None] = (),
) -> tuple[list[list[int]], list[float]]:
    """The best `num_return_sequences` continuations of each prompt: prompt and new tokens, and their scores.

    Each step takes the 2 K best extensions of a prompt's K beams (more with several end tokens). Those of the first K that
    end are kept with their normalised score, and the best K of the others are the next beams.

    Args:
        runner: with num_beams free slots per prompt; all of them are free again afterwards.
        apart: equal prompts get different noise.
        adapters: of each prompt; none: the active ones.
    """
    searches, logits = _start(runner, prompts, config, stopping, apart, adapters or [None] * len(prompts))
    while True:
        with single_threaded_torch(runner):
            logprobs = _logprobs(logits).split([len(search.slots) for search in searches])
            for search, part in zip(searches, logprobs, strict=True):
                search.advance(part, runner)
        slots = [slot for search in searches for slot in search.slots]
        if not slots:
            break
        logits = runner.extend(slots, [[token] for search in searches for token in search.last])
    for search in searches:
        if search.best(1)[0][0] == NEVER:
            raise RuntimeError(NOTHING_LEFT)
    found = [
        (s, search.groups[0].prompt + new) for search in searches for s, new in search.best(config.num_return_sequences)
    ]
    return [tokens for _, tokens in found], [score for score, _ in found]


def _start(
    runner: Runner,
    prompts: list[list[int]],
    config: GenerationConfig,
    stopping: Stopping,
    apart: bool,
    adapters: Sequence[str | None],
) -> tuple[list[Search], Tensor]:
    """Read every prompt once; returns the searches, and the logits of all their beams."""
    K, groups = config.num_beams, config.num_beam_groups
    searches, logits = [], []
    for n, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        slot, first = runner.allocate(1, adapter)[0], n * K if apart else 0
        logits += [runner.extend([slot], [prompt])] * K
        slots = [slot, *runner.fork(slot, K - 1)]
        searches.append(Search([Group(K // groups, prompt, config, stopping, first) for _ in range(groups)], slots))
    return searches, torch.cat(logits)


def _logprobs(logits: Tensor) -> Tensor:
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
