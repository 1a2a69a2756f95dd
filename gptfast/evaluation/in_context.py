"""Accuracy of a model on a task, by the number of solved items in its prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gptfast._checks import check_choice, check_count
from gptfast.evaluation.few_shot import choose_shots, few_shot_prompt
from gptfast.evaluation.labels import NORMALIZE, ContinuationScorer, after_blank, encode_pair, score_labels
from gptfast.evaluation.tasks import Task
from gptfast.evaluation.templates import Item
from gptfast.generation.runner import virtual_tokens
from gptfast.tokenizer import Tokenizer

NOTHING = "N/A"  # what a content-free prompt has instead of a text


def evaluate_task(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    *,
    shots: Sequence[int] = (0,),
    normalize: str = "sum",
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """How many items of a task a model solves.

    An item with labels is solved if its own has the largest score; one without if its answer is the most likely text after the
    prompt, token by token.

    Args:
        model: a GPT or a compiled one.
        shots: numbers of solved items before each prompt, each a point of the curve; in one order for all items, which the
            seed decides.
        normalize: of the labels' scores, see `score_labels`.
        limit: number of items; None: all.
        progress: called after each item of each point.
    Returns:
        curve: a dict for each number of shots, with shots, accuracy, interval (95%, Wilson) and dropped_shots (those that did not
        fit, over all items); accuracy, interval, dropped_shots, samples of the last point. A sample has prompt, scores (by
        label), prediction (None without labels), target, correct, shots. normalize, seed, items, task.
    Raises:
        TypeError, ValueError: options out of range, too few items to show, an item that does not fit the model's context.
    """
    check_choice("evaluate_task", "normalize", normalize, NORMALIZE)
    if task.labels is None and normalize == "calibrated":
        raise ValueError(
            "evaluate_task: normalize is 'calibrated', but the task has no labels to choose from; give labels"
        )
    scorer, room = ContinuationScorer(model), model.config.block_size - virtual_tokens(model)

    def solve(item: Item, shown: Sequence[Item]) -> dict[str, Any]:
        return _solve(scorer, tokenizer, task, item, shown, normalize, room)

    found = accuracy_curve("evaluate_task", task, shots, limit, seed, solve, progress)
    return {"task": task.name, "normalize": normalize, "seed": seed} | found


def accuracy_curve(
    owner: str,
    task: Task,
    shots: Sequence[int],
    limit: int | None,
    seed: int,
    solve: Callable[[Item, Sequence[Item]], dict[str, Any]],
    progress: Callable[[], None] | None,
) -> dict[str, Any]:
    """items, accuracy, interval, dropped_shots, curve and samples, as `evaluate_task` returns them.

    Args:
        solve: of an item and the solved ones before it, a sample: a dict with at least target, correct and dropped.
    """
    if limit is not None:
        check_count(owner, "limit", limit)
    if not shots:
        raise ValueError(f"{owner}: shots is empty; expected numbers of solved items, such as (0, 1, 4)")
    items, curve, samples = list(task.items)[:limit], [], []
    for count in shots:
        samples = []
        for item in items:
            samples.append(solve(item, choose_shots(task.pool, count, seed, item, task.spare)))
            if progress is not None:
                progress()
        solved = sum(sample["correct"] for sample in samples)
        curve.append(
            {
                "shots": count,
                "accuracy": solved / len(samples),
                "interval": wilson(solved, len(samples)),
                "dropped_shots": sum(sample.pop("dropped") for sample in samples),
            }
        )
    last = {name: curve[-1][name] for name in ("accuracy", "interval", "dropped_shots")}
    return {"items": len(items), **last, "curve": curve, "samples": samples}


def without_answer(task: Task, item: Item) -> dict[str, Any]:
    """What a prompt may show of the item that it asks about."""
    return {name: value for name, value in item.items() if name != task.target}


def _solve(
    scorer: ContinuationScorer,
    tokenizer: Tokenizer,
    task: Task,
    item: Item,
    shown: Sequence[Item],
    normalize: str,
    context: int,
) -> dict[str, Any]:
    target = item[task.target]
    hidden = without_answer(task, item)
    labels = [target] if task.labels is None else task.labels
    lead = task.template.lead
    room = max(len(tokenizer.encode(f"{lead} {label}")) for label in labels)
    prompt = few_shot_prompt(task.template, hidden, shown, tokenizer, context, room)
    text = prompt.text + lead
    sample = {"prompt": text, "target": target, "shots": prompt.shots, "dropped": prompt.dropped}
    if task.labels is None:
        before, after = encode_pair(tokenizer, text, after_blank(text, target))
        (found,) = scorer(before, [after])
        return sample | {"scores": {target: found.logprob}, "prediction": None, "correct": found.is_greedy}
    content_free = None
    if normalize == "calibrated":
        nothing = {name: NOTHING if isinstance(value, str) else value for name, value in hidden.items()}
        content_free = task.template.render(nothing, shown[: prompt.shots]) + lead
    scores = score_labels(scorer, tokenizer, text, labels, normalize, content_free)
    prediction = max(scores, key=lambda label: scores[label])
    return sample | {"scores": scores, "prediction": prediction, "correct": prediction == target}


def wilson(solved: int, items: int) -> list[float]:
    """The 95% interval of a share (Wilson 1927), [low, high]."""
    z, share = 1.959964, solved / items
    middle = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(share * (1 - share) / items + (z / items) ** 2 / 4)
    # It holds the share: where none or all are solved that is an end, which rounding must not put beyond it.
    return [max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))]
