"""Recipes: the published hyper-parameters of GPT-1, GPT-2 and GPT-3, with what was never published or contradicts itself.

Sources: Radford et al. 2018, section 4.1 (GPT-1); Radford et al. 2019, sections 2.3 and 3 (GPT-2); Brown et al., arXiv
2005.14165, table 2.1 and appendix B (GPT-3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from gptfast.config import PRESETS

_GPT3 = "Brown et al., arXiv 2005.14165, table 2.1 and appendix B"
_K = 1024


@dataclass(frozen=True)
class Recipe:
    """How a published model was trained.

    preset: its shape, where no other is chosen.
    tokens_per_step: of one update: batch_size * grad_accum * block_size.
    batch_size: rows of one pass, which is ours: it decides memory and no result.
    options: the other hyper-parameters by the names of the fields of `TrainConfig` and `GPTConfig`.
    source: where they were published.
    notes: sentences about what was not published, or contradicts itself, and what stands here instead.
    """

    preset: str
    tokens_per_step: int
    batch_size: int
    options: dict[str, Any]
    source: str
    notes: tuple[str, ...] = field(default=())


def recipe(name: str) -> Recipe:
    """A recipe by its name, which is that of a preset.

    Raises:
        ValueError: unknown name.
    """
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1)
        hint = f" - did you mean {near[0]}?" if near else ""
        raise ValueError(f"train: `recipe` is {name!r}; expected one of {', '.join(RECIPES)}{hint}")
    return RECIPES[name]


def _gpt1() -> Recipe:
    batch = 64 * 512
    return Recipe(
        "gpt1",
        batch,
        8,
        {
            "optimizer": "adamw",
            "schedule": "cosine",
            "learning_rate": 2.5e-4,
            "min_lr": 0.0,
            "warmup_steps": 2000,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.999,
            "grad_clip": 1.0,
            "dropout": 0.1,
        },
        "Radford et al. 2018, section 4.1",
        (
            "100 epochs over BooksCorpus: give the number of steps with `max_steps`.",
            "Adam's betas and the clipping were not published: 0.9 and 0.999 are Adam's defaults, 1.0 is GPT-3's clipping.",
            'The paper\'s "modified version of L2 regularization" with w = 0.01 is here decoupled weight decay.',
        ),
    )


def _gpt2(name: str) -> Recipe:
    return Recipe(
        name,
        512 * _K,
        8,
        {
            "optimizer": "adamw",
            "schedule": "cosine",
            "learning_rate": {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}[name],
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "grad_clip": 1.0,
            "dropout": 0.1,
        },
        "Radford et al. 2019, sections 2.3 and 3",
        (
            'GPT-2\'s learning rate was never published ("manually tuned for the best perplexity on a 5% held-out sample"): '
            "here stands that of the GPT-3 model of this size.",
            "Nor were its schedule, weight decay, betas and clipping: here stand GPT-3's. Published are the batch of 512 rows "
            "of 1024 tokens and the architecture.",
        ),
    )


def _gpt3(size: str, batch: int, rate: float, *notes: str, rows: int = 8) -> Recipe:
    warmup, decay, whole = (round(tokens / batch) for tokens in (375e6, 260e9, 300e9))
    return Recipe(
        f"gpt3-{size}",
        batch,
        rows,
        {
            "optimizer": "adamw",
            "schedule": "cosine",
            "learning_rate": rate,
            "min_lr": float(f"{rate / 10:g}"),
            "warmup_steps": warmup,
            "lr_decay_steps": decay,
            "max_steps": whole,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "grad_clip": 1.0,
            "dropout": 0.0,
            "batch_warmup_tokens": 4_000_000_000 if batch < _K * _K else 12_000_000_000,
        },
        _GPT3,
        (
            "Tokens of the paper as steps of the full batch: warm-up over 375 million, cosine over 260 billion, 300 billion in "
            "all.",
            'The batch size grows from 32k tokens over the first 4 to 12 billion tokens, "depending on the model size": 4 '
            "for batches below a million here, 12 for larger ones.",
            *notes,
        ),
    )


_XL = "The table gives XL 24 heads of 128 at 2048 channels, which contradicts itself: 24 * 128 = 3072. 16 heads here."
_13B = "The table gives 13B 5140 channels with 40 heads of 128, which contradicts itself: 40 * 128 = 5120. 5120 here."

RECIPES: dict[str, Recipe] = {
    "gpt1": _gpt1(),
    **{name: _gpt2(name) for name in PRESETS if name.startswith("gpt2")},
    "gpt3-125m": _gpt3("125m", 512 * _K, 6e-4),
    "gpt3-350m": _gpt3("350m", 512 * _K, 3e-4),
    "gpt3-760m": _gpt3("760m", 512 * _K, 2.5e-4),
    "gpt3-1.3b": _gpt3("1.3b", 1024 * _K, 2e-4, _XL),
    "gpt3-2.7b": _gpt3("2.7b", 1024 * _K, 1.6e-4),
    "gpt3-6.7b": _gpt3("6.7b", 2048 * _K, 1.2e-4, rows=4),
    "gpt3-13b": _gpt3("13b", 2048 * _K, 1e-4, _13B, rows=4),
    "gpt3-175b": _gpt3("175b", 3200 * _K, 6e-5, rows=4),
}
"""By the name of their preset."""


def recipe_options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of `gptfast train` that a recipe sets, without those that were given.

    Passes are added to the step until it has the recipe's tokens, whatever `batch_size` and `block_size` are.

    Args:
        name: of the recipe.
        given: options that were given; they go before the recipe's.
    Raises:
        ValueError: unknown name.
    """
    chosen = recipe(name)
    preset = {} if {"preset", "init_from"} & set(given) else {"preset": chosen.preset}
    options = {**preset, "batch_size": chosen.batch_size, **chosen.options, **given}
    if "grad_accum" not in given:
        shape = PRESETS.get(given.get("preset", chosen.preset), {})
        block_size = given.get("block_size") or shape.get("block_size", 1024)
        options["grad_accum"] = max(1, round(chosen.tokens_per_step / (options["batch_size"] * block_size)))
    if "max_minutes" in given and "max_steps" not in given:
        options.pop("max_steps", None)
    return options
