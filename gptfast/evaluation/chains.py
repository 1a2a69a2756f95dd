"""Tasks solved by generation: chains of thought, and the majority of several (Wang et al., arXiv 2203.11171)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gptfast._checks import check_count, check_real
from gptfast.evaluation.few_shot import check_pattern, extract_answer, few_shot_prompt, majority
from gptfast.evaluation.in_context import accuracy_curve, without_answer
from gptfast.evaluation.tasks import Task
from gptfast.evaluation.templates import Item
from gptfast.generation.runner import virtual_tokens
from gptfast.tokenizer import Tokenizer

STOP = "\n\n"  # between the items of a prompt
TEMPERATURE, MOST_TOKENS = 0.7, 128  # of several samples; of a text


def solve_by_generation(
    model: Any,
    tokenizer: Tokenizer,
    task: Task,
    *,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    pattern: str | None = None,
    shots: Sequence[int] = (0,),
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """How many items of a task a model solves by writing: the answer is found in each text, and that of most texts counts.

    A text ends at a blank line, at the model's end token, or after `max_new_tokens`: 128, or half of a shorter context.

    Args:
        model: a GPT or a compiled one.
        samples: texts for each item.
        temperature: of the draws; 0: the likeliest token each time. None: 0 for one sample, else 0.7.
        pattern: of the answer in a text, see `extract_answer`; None: the template's.
        shots, limit, seed, progress: as in `evaluate_task`.
    Returns:
        As `evaluate_task`. A sample has prompt, texts (one a sample), answers (None where a text has none), prediction (the
        majority), agreement (share of the texts with it), target, correct, shots. Also agreement, the mean; samples_an_item,
        temperature and pattern.
    Raises:
        TypeError, ValueError: as `evaluate_task`; samples, temperature or max_new_tokens out of range, or no regular expression.
    """
    owner = "solve_by_generation"
    check_count(owner, "samples", samples)
    context = model.config.block_size - virtual_tokens(model)
    longest = context - 1
    if max_new_tokens is None:
        max_new_tokens = max(1, min(MOST_TOKENS, longest // 2))
    check_count(owner, "max_new_tokens", max_new_tokens, 1, longest, " (the model's block_size less one)")
    if temperature is None:
        temperature = 0.0 if samples == 1 else TEMPERATURE
    check_real(owner, "temperature", temperature, "a number of at least 0", lambda x: x >= 0)
    pattern = task.template.answer if pattern is None else pattern
    check_pattern(owner, pattern)

    def solve(item: Item, shown: Sequence[Item]) -> dict[str, Any]:
        prompt = few_shot_prompt(task.template, without_answer(task, item), shown, tokenizer, context, max_new_tokens)
        texts = _write(model, tokenizer, prompt.text, samples, temperature, max_new_tokens, seed)
        answers = [extract_answer(text, pattern) for text in texts]
        prediction, target = majority(answers), item[task.target].strip()
        return {
            "prompt": prompt.text,
            "texts": texts,
            "answers": answers,
            "prediction": prediction,
            "agreement": answers.count(prediction) / samples if prediction is not None else 0.0,
            "target": target,
            "correct": prediction is not None and prediction.strip() == target,
            "shots": prompt.shots,
            "dropped": prompt.dropped,
        }

    found = accuracy_curve(owner, task, shots, limit, seed, solve, progress)
    agreement = sum(sample["agreement"] for sample in found["samples"]) / len(found["samples"])
    chosen = {"samples_an_item": samples, "temperature": temperature, "pattern": pattern, "agreement": agreement}
    return {"task": task.name, "seed": seed, **chosen, **found}


def _write(
    model: Any, tokenizer: Tokenizer, prompt: str, samples: int, temperature: float, max_new_tokens: int, seed: int
) -> list[str]:
    """Texts that follow a prompt; its tokens are computed once for all of them."""
    ids = tokenizer.encode(prompt)
    drawn = {"temperature": temperature, "seed": seed} if temperature else {}
    found = model.generate(
        [ids],
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples if temperature else 1,
        stop_strings=STOP,
        tokenizer=tokenizer,
        **drawn,
    )
    texts = [tokenizer.decode(row[len(ids) :]).split(STOP)[0] for row in found]
    return texts * (samples // len(texts))  # without draws all are the same
