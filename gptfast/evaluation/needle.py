"""A needle in a haystack: whether a model finds a pass key in a long text, by the text's length and the key's place in it
(Mohtashami and Jaggi, arXiv 2305.16300; Chen et al., arXiv 2306.15595)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gptfast._checks import check_count
from gptfast._files import as_drawn, save_figure
from gptfast.evaluation.labels import encode_pair
from gptfast.generation.runner import Runner, single_threaded_torch, virtual_tokens
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.base import encode_part, first_tokens

OWNER = "needle_test"
HAYSTACK = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = " What is the pass key? The pass key is"
DIGITS = 5
LENGTHS, DEPTHS, TRIALS = 4, 5, 3
_CHARACTERS = 16  # of a haystack that are encoded for each token of a prompt


def needle_test(
    model: Any,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int] | None = None,
    depths: int = DEPTHS,
    trials: int = TRIALS,
    haystack: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """How often a model finds a pass key of five digits in a text that says nothing else about it.

    A prompt is the haystack, cut to length, with the needle in it, and the question behind it. The key is found where each of its
    tokens is the most likely one after those before it. A prompt is read in parts: the peak of memory is keys and values of its
    length, and the activations of a part.

    Args:
        model: a GPT, or a compiled one.
        lengths: tokens of a prompt with question and key, each at most the model's context; None: the context, and halves of it
            down to an eighth.
        depths: number of places, evenly from the beginning of the haystack to its end; 1: its middle.
        trials: keys that are tried at each length and place.
        haystack: a text, which is repeated where it is too short; None: five sentences about grass and the sky.
        seed: decides the keys.
        progress: called after each prompt.
    Returns:
        lengths, depths (from 0 to 1), found: by length and depth the share of keys that are found; accuracy: of all; trials, seed.
    Raises:
        TypeError, ValueError: numbers out of range, a length without room for needle and question, an empty haystack, or a
            tokenizer that cannot encode these texts.
    """
    check_count(OWNER, "depths", depths)
    check_count(OWNER, "trials", trials)
    room = model.config.block_size - virtual_tokens(model)
    key = "9" * DIGITS
    parts = (NEEDLE.format(key=key), f"{QUESTION} {key}")
    least = len(first_tokens(tokenizer)) + sum(len(encode_part(tokenizer, part)) for part in parts) + 1
    asked = lengths if lengths is not None else [n for n in (room >> s for s in range(LENGTHS)[::-1]) if n >= least]
    if not asked:
        raise ValueError(f"{OWNER}: the model's context is {room} tokens; needle and question alone take {least}")
    for n in asked:
        check_count(OWNER, "length", n, least, room, " (the model's context)")
    filler = encode_part(tokenizer, HAYSTACK if haystack is None else haystack[: _CHARACTERS * max(asked)])
    if not filler:
        raise ValueError(f"{OWNER}: haystack is empty; expected a text")
    places = [0.5] if depths == 1 else [n / (depths - 1) for n in range(depths)]
    draw, runner = random.Random(seed), model.runner(1, max(asked))
    keys = ["".join(draw.choice("0123456789") for _ in range(DIGITS)) for _ in range(trials)]
    found = []
    for n in asked:
        found.append([])
        for place in places:
            hits = 0
            for key in keys:
                hits += _finds(runner, *_prompt(tokenizer, filler, n, place, key))
                if progress is not None:
                    progress()
            found[-1].append(hits / trials)
    accuracy = sum(map(sum, found)) / (len(asked) * len(places))
    named = {"lengths": list(asked), "depths": places, "found": found, "accuracy": accuracy}
    return {**named, "trials": trials, "seed": seed}


def _prompt(tokenizer: Tokenizer, filler: list[int], n: int, place: float, key: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt, and those of the key behind it, n together."""
    first, needle = first_tokens(tokenizer), encode_part(tokenizer, NEEDLE.format(key=key))
    question, answer = encode_pair(tokenizer, QUESTION, f" {key}")
    question = question[len(first) :]
    size = n - len(first) - len(needle) - len(question) - len(answer)
    hay = (filler * (size // len(filler) + 1))[:size]
    at = round(place * size)
    return [*first, *hay[:at], *needle, *hay[at:], *question], answer


def _finds(runner: Runner, prompt: list[int], answer: list[int]) -> bool:
    with single_threaded_torch(runner), torch.inference_mode():
        (slot,) = runner.allocate()
        try:
            logits = [runner.extend([slot], [prompt])]
            if len(answer) > 1:
                logits.append(runner.extend([slot], [answer[:-1]], last_only=False)[0])
            return torch.cat(logits).argmax(-1).tolist() == answer
        finally:
            runner.free(slot)


def plot_needles(results: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw how often the key is found, by length and depth, as a PNG file, a panel a model.

    Args:
        results: what `needle_test` returns, by the name of the model.
    Raises:
        ImportError: matplotlib is not installed.  OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.2 * len(results), 3.8), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        lengths, depths = result["lengths"], result["depths"]
        columns = list(zip(*result["found"], strict=True))
        drawn = axis.imshow(columns, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set(xlabel="tokens of the prompt", ylabel="depth of the needle")
        axis.set_title(f"{as_drawn(name)}: {result['accuracy']:.0%} found", fontsize=9)
    figure.colorbar(drawn, ax=axes, label=f"share of {result['trials']} keys found")
    save_figure(figure, path)
