"""Which options of a `GenerationConfig` go together."""

from __future__ import annotations

import math
from typing import Any


def check_combination(config: Any) -> None:
    """Check that the options of a GenerationConfig, each in its range, do not contradict each other.

    Raises:
        TypeError, ValueError: two that do; the message says how to put it right.
    """
    _check_drawing(config)
    if config.num_beams > 1:
        _check_beams(config)
    elif config.num_beam_groups > 1 or config.diversity_penalty:
        raise ValueError(
            f"generate: num_beam_groups={config.num_beam_groups}, diversity_penalty={config.diversity_penalty} with one "
            "beam; they are for beam search - set num_beams, or leave them out"
        )


def _check_drawing(config: Any) -> None:
    """Drawing and its opposite were not both asked for."""
    if config.do_sample not in (None, True, False):
        raise TypeError(f"generate: do_sample is {config.do_sample!r}; expected True, False or None")
    if config.do_sample and config.temperature == 0:
        raise ValueError(
            "generate: do_sample=True with temperature=0, which draws nothing; raise the temperature or leave "
            "do_sample out"
        )
    if config.do_sample is False and (config.temperature not in (0, 1) or _cuts(config)):
        raise ValueError(
            f"generate: do_sample=False with {_drawing_options(config)}; without drawing these mean nothing - leave "
            "them or do_sample out"
        )
    if config.num_return_sequences > config.num_beams == 1 and config.do_sample is False and config.temperature != 0:
        raise ValueError(
            f"generate: num_return_sequences is {config.num_return_sequences} without drawing, which writes the same text "
            "each time; give do_sample=True, a temperature or a seed, or as many num_beams"
        )


def _check_beams(config: Any) -> None:
    if config.num_return_sequences > config.num_beams:
        raise ValueError(
            f"generate: num_return_sequences is {config.num_return_sequences} but num_beams is {config.num_beams}; beam "
            "search returns at most one sequence per beam - raise num_beams"
        )
    if not config.do_sample and (config.temperature not in (0, 1) or _cuts(config)):
        raise ValueError(
            f"generate: num_beams={config.num_beams} with {_drawing_options(config)}; beam search draws nothing - leave "
            "these at their defaults, or set do_sample=True"
        )
    if abs(config.length_penalty) * math.log(config.max_new_tokens or 1) > 700:  # exp(709) is the largest double
        raise ValueError(
            f"generate: length_penalty is {config.length_penalty}; {config.max_new_tokens} new tokens to this power is "
            "beyond the range of a float - use something between -2 and 2"
        )
    _check_groups(config)
    if config.overflow == "slide":
        raise ValueError("generate: overflow='slide' with beams; beams must fit the block_size - use overflow='error'")
    if config.prompt_lookup_num_tokens:
        raise ValueError(
            f"generate: prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} with num_beams={config.num_beams}; "
            "guessed tokens serve one sequence, not beams - leave one out"
        )


def _check_groups(config: Any) -> None:
    groups = config.num_beam_groups
    if config.num_beams % groups:
        raise ValueError(
            f"generate: num_beams is {config.num_beams} and num_beam_groups {groups}; expected a multiple - every group "
            "has equally many beams"
        )
    if groups > 1 and config.do_sample:
        raise ValueError(f"generate: num_beam_groups={groups} with do_sample=True; diverse beams draw nothing")
    if (groups > 1) != (config.diversity_penalty > 0):
        raise ValueError(
            f"generate: num_beam_groups is {groups} and diversity_penalty {config.diversity_penalty}; groups need a "
            "penalty above 0, or they are all alike, and a penalty needs groups"
        )


def _cuts(config: Any) -> bool:
    return bool(config.top_k or config.top_p != 1 or config.min_p)


def _drawing_options(config: Any) -> str:
    names = ["temperature", "top_k", "top_p"] + ["min_p"] * bool(config.min_p)
    return ", ".join(f"{name}={getattr(config, name)}" for name in names)
