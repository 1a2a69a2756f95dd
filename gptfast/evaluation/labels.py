"""Log-likelihoods of continuations of a prompt: labels, answers, last words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gptfast import ops
from gptfast._checks import check_choice
from gptfast.generation.runner import single_threaded_torch
from gptfast.tokenizer import Tokenizer

NORMALIZE = ("sum", "token", "byte", "calibrated")


class Continuation(NamedTuple):
    """logprob: of all its tokens, in nats. tokens: their number. is_greedy: whether each is the most likely one."""

    logprob: float
    tokens: int
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows. Blanks at the end of the context belong to the continuation, and both together
    are encoded as one text, as lm-evaluation-harness does; where a token would span the join, each is encoded alone."""
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if whole[: len(before)] != before:
        return before, tokenizer.encode(continuation)
    return before, whole[len(before) :]


class ContinuationScorer:
    """Scores continuations with a model; what a prompt shares with the one before it is not computed again.

    Args:
        model: a GPT or a compiled one, as it is now.
        most: continuations of a prompt at a time.
    """

    def __init__(self, model: Any, most: int = 8) -> None:
        self._runner = model.runner(most + 1, model.config.block_size)
        self._most, self._limit = most, model.config.block_size
        self._slot, self._held = self._runner.allocate()[0], []

    def __call__(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Continuation]:
        """The scores of continuations of one context.

        Raises:
            ValueError: no context, an empty continuation, or more tokens than the model's context holds.
        """
        context = list(context)
        for tokens in continuations:
            if not context or not tokens or len(context) + len(tokens) - 1 > self._limit:
                raise ValueError(
                    f"score_labels: a prompt of {len(context)} tokens and a continuation of {len(tokens)}; expected at least one "
                    f"of each, and at most {self._limit + 1} together"
                )
        with single_threaded_torch(self._runner), torch.inference_mode():
            first = self._read(context)
            found = []
            for start in range(0, len(continuations), self._most):
                found += self._score(first, [list(tokens) for tokens in continuations[start : start + self._most]])
        return found

    def _read(self, context: list[int]) -> torch.Tensor:
        """The logits after the context, (1, V)."""
        shared = 0
        while shared < min(len(self._held), len(context) - 1) and self._held[shared] == context[shared]:
            shared += 1
        self._runner.truncate(self._slot, shared)
        self._held = context
        return self._runner.extend([self._slot], [context[shared:]])

    def _score(self, first: torch.Tensor, continuations: list[list[int]]) -> list[Continuation]:
        long = [n for n, tokens in enumerate(continuations) if len(tokens) > 1]
        following: dict[int, torch.Tensor] = {}
        if long:
            slots = self._runner.fork(self._slot, len(long))
            try:
                read = self._runner.extend(slots, [continuations[n][:-1] for n in long], last_only=False)
                following = dict(zip(long, read, strict=True))
            finally:
                for slot in slots:
                    self._runner.free(slot)
        found = []
        for n, tokens in enumerate(continuations):
            logits = torch.cat([first, following[n]]) if n in following else first
            wanted = torch.tensor(tokens, device=logits.device)
            logprob = -float(ops.cross_entropy(logits, wanted, reduction="none").double().sum())
            found.append(Continuation(logprob, len(tokens), bool((logits.argmax(-1) == wanted).all())))
        return found


def score_labels(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    labels: Sequence[str],
    normalize: str = "sum",
    content_free: str | None = None,
) -> dict[str, float]:
    """How likely each label is after a prompt.

    Args:
        model: a GPT or a compiled one; or a `ContinuationScorer` of it, for many prompts.
        labels: texts. A blank is put between prompt and label where neither has one.
        normalize: "sum" of the log-probabilities of the label's tokens, in nats; its mean by "token"; the sum by "byte" of
            the label; or "calibrated": the sum less that after the content-free prompt (Zhao et al., arXiv 2102.09690; Holtzman
            et al., arXiv 2104.08315).
        content_free: for "calibrated": the prompt with nothing to judge, such as "Review: N/A\\nSentiment:".
    Returns:
        The score of each label; the largest is the prediction.
    Raises:
        ValueError: no labels, two alike, an unknown way to normalise, a prompt that is empty or too long.
    """
    check_choice("score_labels", "normalize", normalize, NORMALIZE)
    if not labels or len(set(labels)) < len(labels) or not all(labels):
        raise ValueError(f"score_labels: labels are {list(labels)}; expected texts, at least one and none twice")
    if (normalize == "calibrated") != (content_free is not None):
        raise ValueError(
            "score_labels: `content_free` goes with normalize='calibrated', which needs it; give both or neither"
        )
    scorer = model if isinstance(model, ContinuationScorer) else ContinuationScorer(model)
    scores = _sums(scorer, tokenizer, prompt, labels)
    if content_free is not None:
        base = _sums(scorer, tokenizer, content_free, labels)
        return {label: one.logprob - other.logprob for label, one, other in zip(labels, scores, base, strict=True)}
    sizes = {
        "sum": [1] * len(labels),
        "token": [one.tokens for one in scores],
        "byte": [len(x.encode()) for x in labels],
    }
    return {label: one.logprob / size for label, one, size in zip(labels, scores, sizes[normalize], strict=True)}


def _sums(scorer: ContinuationScorer, tokenizer: Tokenizer, prompt: str, labels: Sequence[str]) -> list[Continuation]:
    pairs = [encode_pair(tokenizer, prompt, after_blank(prompt, label)) for label in labels]
    return scorer(pairs[0][0], [continuation for _, continuation in pairs])


def after_blank(prompt: str, label: str) -> str:
    """The label, with a blank before it unless it or the end of the prompt has one."""
    return label if prompt[-1:].isspace() or label[:1].isspace() else " " + label
