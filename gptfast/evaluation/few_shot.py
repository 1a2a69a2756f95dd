"""In-context learning: solved items before a prompt, answers in a text, votes."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gptfast._checks import check_count
from gptfast.evaluation.templates import Item, Template
from gptfast.tokenizer import Tokenizer


class FewShotPrompt(NamedTuple):
    """text: the prompt. shots: how many solved items it holds. dropped: how many did not fit."""

    text: str
    shots: int
    dropped: int


class Agreement(NamedTuple):
    """answer: of most samples. answers: of each, None without one. agreement: share of the samples with that answer."""

    answer: str | None
    answers: list[str | None]
    agreement: float


def choose_shots(
    pool: Sequence[Item], k: int, seed: int, exclude: Item | None = None, spare: Sequence[Item] = ()
) -> list[Item]:
    """k items of a pool in an order that the seed decides: fewer shots are the beginning of more.

    Args:
        exclude: an item that is not chosen, so that a question does not come with its own answer.
        spare: items that are taken, in the same way, where the pool has too few.
    Raises:
        TypeError, ValueError: k is no count, or the pool has fewer items.
    """
    check_count("choose_shots", "k", k, 0)
    ordered = [item for items in (pool, spare) for item in random.Random(seed).sample(list(items), len(items))]
    chosen = [item for item in ordered if exclude is None or item != exclude][:k]
    if len(chosen) < k:
        raise ValueError(
            f"choose_shots: k is {k}, but the pool has {len(chosen)} items to choose from; give fewer shots"
        )
    return chosen


def few_shot_prompt(
    template: Template, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, context: int, room: int
) -> FewShotPrompt:
    """The prompt with as many of the shots as fit; the last ones are dropped first.

    Args:
        context: most tokens of prompt and answer.
        room: tokens of the answer.
    Raises:
        ValueError: the item alone does not fit.
    """
    for count in range(len(shots), -1, -1):
        text = template.render(item, shots[:count])
        size = len(tokenizer.encode(text))
        if size + room <= context:
            return FewShotPrompt(text, count, len(shots) - count)
    raise ValueError(
        f"few_shot_prompt: the item alone has {size} tokens and its answer {room}, but the context has {context}; leave it out, "
        "or take a model with a longer context"
    )


def extract_answer(text: str, pattern: str) -> str | None:
    """The first match of a regular expression in a text: its first group, if it has one; None without a match.

    Raises:
        ValueError: no regular expression.
    """
    check_pattern("extract_answer", pattern)
    found = re.search(pattern, text)
    return None if found is None else found[1] if found.re.groups else found[0]


def check_pattern(owner: str, pattern: str) -> None:
    """Raise ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{owner}: pattern is {pattern!r}: {error}; expected a regular expression") from error


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer that most gave; None does not vote, and of a tie the first one seen wins."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=lambda answer: votes[answer], default=None)


def self_consistency(generate: Callable[[str, int], str], prompt: str, n: int, pattern: str) -> Agreement:
    """The majority among n sampled answers (Wang et al., arXiv 2203.11171).

    Args:
        generate: a function of prompt and seed that returns a text; it is called with the seeds 0 .. n - 1.
        pattern: of the answer in a text, see `extract_answer`.
    Raises:
        TypeError, ValueError: n is not at least 1, or the pattern is no regular expression.
    """
    check_count("self_consistency", "n", n)
    answers = [extract_answer(generate(prompt, seed), pattern) for seed in range(n)]
    answer = majority(answers)
    return Agreement(answer, answers, answers.count(answer) / n if answer is not None else 0.0)
