"""Log-likelihoods of continuations of contexts, with what contexts share computed once.  N contexts, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.runner import single_threaded_torch, virtual_tokens
from gptfast.generation.scoring import NAN

TOKENS = 1024  # tokens of contexts that are read together, beyond what they share
PIECE = 256  # positions whose logits are held at a time: 51 MB for GPT-2
WORTH = 16  # tokens; a longer shared beginning is read in a call of its own, a shorter one again with each continuation
ROWS = 64  # first tokens that are looked up at a time

Ids = Sequence[int]


class Continuation(NamedTuple):
    """The score of a continuation.

    logprob: of all its tokens, in nats. tokens: their number. is_greedy: whether each is the most likely one.
    """

    logprob: float
    tokens: int
    is_greedy: bool


class ContinuationScorer:
    """Scores continuations with a model; what a context shares with the one before it is not computed again.

    The head runs at the positions that predict tokens of continuations, and nowhere else. In the native engine a score does
    not depend on what else is scored, bit for bit.

    Args:
        model: a GPT or a compiled one, as it is now.
        most: contexts and continuations at a time.
        limit: most tokens that are read of a context and its continuation; None: as many as the model reads.
    """

    def __init__(self, model: Any, most: int = 8, limit: int | None = None) -> None:
        self._runner = model.runner(most + 1, model.config.block_size)
        self._most, room = most, model.config.block_size - virtual_tokens(model)
        self.limit = room if limit is None else min(limit, room)
        self._slot, self._held = self._runner.allocate()[0], tuple[int, ...]()

    def __call__(self, context: Ids, continuations: Sequence[Ids]) -> list[Continuation]:
        """The scores of continuations of one context; see `score`."""
        return self.score([(context, tokens) for tokens in continuations])

    def score(
        self, pairs: Sequence[tuple[Ids, Ids]], progress: Callable[[int], Any] | None = None
    ) -> list[Continuation]:
        """The scores of pairs of context and continuation.

        Args:
            progress: called with the number of pairs that a step has scored.
        Raises:
            ValueError: no context, an empty continuation, or more tokens than the model's context holds.
            RuntimeError: the logits hold nan.
        """
        by_context: dict[tuple[int, ...], list[int]] = {}
        for n, (context, tokens) in enumerate(pairs):
            self._check(context, tokens)
            by_context.setdefault(tuple(context), []).append(n)
        found: list[Continuation] = [Continuation(0.0, 0, True)] * len(pairs)
        with single_threaded_torch(self._runner), torch.inference_mode():
            for contexts in self._batches(sorted(by_context)):
                slots, logits = self._read(contexts)
                try:
                    wanted = [(row, n) for row, context in enumerate(contexts) for n in by_context[context]]
                    self._score_first(logits, wanted, pairs, found)
                    self._score_rest(slots, wanted, pairs, found)
                finally:
                    for slot in slots:
                        if slot != self._slot:
                            self._runner.free(slot)
                if progress is not None:
                    progress(len(wanted))
        return found

    def _check(self, context: Ids, tokens: Ids) -> None:
        if not context or not tokens or len(context) + len(tokens) - 1 > self.limit:
            raise ValueError(
                f"score_labels: a prompt of {len(context)} tokens and a continuation of {len(tokens)}; expected at least one "
                f"of each, and at most {self.limit + 1} together; take fewer shots, or a model with a longer context"
            )

    def _batches(self, contexts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Contexts to read together; sorted, so that the first and the last one share what all of a batch share."""
        batch: list[tuple[int, ...]] = []
        tokens = 0
        for context in contexts:
            if batch:
                common = shared(batch[0], context)
                new = tokens + len(context) - common * (len(batch) + 1)
                if new > TOKENS or 2 * len(batch) >= self._most:
                    yield batch
                    batch, tokens = [], 0
            batch.append(context)
            tokens += len(context)
        if batch:
            yield batch

    def _read(self, contexts: list[tuple[int, ...]]) -> tuple[list[int], Tensor]:
        """Slots that hold the contexts, and the logits after each, (N, V)."""
        first, alone = contexts[0], len(contexts) == 1
        common = first if alone else first[: min(shared(first, contexts[-1]), len(first) - 1)]
        held = min(shared(self._held, common), len(first) - 1)
        if not alone and len(common) - held < WORTH:
            common = common[:held]
        self._runner.truncate(self._slot, held)
        self._held = common[:held]
        logits = None
        if len(common) > held:
            logits = self._runner.extend([self._slot], [common[held:]])
            self._held = common
        if alone:
            assert logits is not None  # at least the last token was read
            return [self._slot], logits
        slots = self._runner.fork(self._slot, len(contexts))
        try:
            return slots, self._runner.extend(slots, [context[len(common) :] for context in contexts])
        except BaseException:
            for slot in slots:
                self._runner.free(slot)
            raise

    def _score_first(
        self, logits: Tensor, wanted: list[tuple[int, int]], pairs: Sequence[tuple[Ids, Ids]], found: list[Continuation]
    ) -> None:
        """The first token of each continuation. wanted: (row of the logits, index of the pair)."""
        for start in range(0, len(wanted), ROWS):
            part = wanted[start : start + ROWS]
            rows = logits[[row for row, _ in part]]
            scores = _scores(rows, [pairs[n][1][0] for _, n in part])
            for (_, n), (logprob, greedy) in zip(part, scores, strict=True):
                found[n] = Continuation(logprob, 1, greedy)

    def _score_rest(
        self,
        slots: list[int],
        wanted: list[tuple[int, int]],
        pairs: Sequence[tuple[Ids, Ids]],
        found: list[Continuation],
    ) -> None:
        """The other tokens, each continuation in a copy of its context's slot."""
        jobs = [(slots[row], n) for row, n in wanted if len(pairs[n][1]) > 1]
        free = self._most - sum(slot != self._slot for slot in slots)
        for part in _parts(jobs, [len(pairs[n][1]) - 1 for _, n in jobs], free):
            copies: list[int] = []
            try:
                for slot, _ in part:
                    copies += self._runner.fork(slot, 1)
                longest = max(len(pairs[n][1]) for _, n in part) - 1
                for start in range(0, longest, PIECE):  # a second round has one continuation, a long one
                    read = [list(pairs[n][1][start : start + PIECE + 1]) for _, n in part]
                    logits = self._runner.extend(copies, [tokens[:-1] for tokens in read], last_only=False)
                    for (_, n), rows, tokens in zip(part, logits, read, strict=True):
                        scores = _scores(rows, tokens[1:])
                        logprob = found[n].logprob + sum(logprob for logprob, _ in scores)
                        greedy = found[n].is_greedy and all(greedy for _, greedy in scores)
                        found[n] = Continuation(logprob, found[n].tokens + len(scores), greedy)
            finally:
                for slot in copies:
                    self._runner.free(slot)


def shared(a: Ids, b: Ids) -> int:
    """The number of tokens with which both begin."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _parts(jobs: list[tuple[int, int]], sizes: list[int], most: int) -> Iterator[list[tuple[int, int]]]:
    """The jobs in parts of at most `most` and PIECE positions; one that is longer is a part of its own."""
    part: list[tuple[int, int]] = []
    positions = 0
    for job, size in zip(jobs, sizes, strict=True):
        if part and (positions + size > PIECE or len(part) == most):
            yield part
            part, positions = [], 0
        part.append(job)
        positions += size
    if part:
        yield part


def _scores(logits: Tensor, tokens: list[int]) -> list[tuple[float, bool]]:
    """(log-probability, whether it is the most likely one) of a token after each row of the logits."""
    wanted = torch.tensor(tokens, device=logits.device)
    losses = ops.cross_entropy(logits, wanted, reduction="none").tolist()
    if any(loss != loss for loss in losses):
        raise RuntimeError(NAN)
    return list(zip([-loss for loss in losses], (logits.argmax(-1) == wanted).tolist(), strict=True))
