"""Log-likelihoods of continuations of a prompt: labels, answers, last words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptfast._checks import check_choice
from gptfast.evaluation.continuations import Continuation, ContinuationScorer
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.base import encode_part

NORMALIZE = ("sum", "token", "byte", "calibrated")


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows. Blanks at the end of the context belong to the continuation, and both together
    are encoded as one text, as lm-evaluation-harness does; where a token would span the join, each is encoded alone."""
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if whole[: len(before)] != before:
        return before, encode_part(tokenizer, continuation)
    return before, whole[len(before) :]


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
        TypeError: labels that are no texts, or one text alone.
        ValueError: no labels, two alike, an unknown way to normalise, a prompt that is empty or too long.
    """
    check_choice("score_labels", "normalize", normalize, NORMALIZE)
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"score_labels: labels are {labels!r}; expected a list of texts")
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
