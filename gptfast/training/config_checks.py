"""Fields of a TrainConfig that contradict each other."""

from __future__ import annotations

from typing import Any


def check_together(config: Any) -> None:
    """Raises ValueError: two fields of a TrainConfig contradict each other."""
    if config.max_steps is None and config.max_minutes is None:
        raise ValueError("TrainConfig: max_steps and max_minutes are both None; give at least one of them")
    if config.min_lr is not None and config.min_lr > config.learning_rate:
        raise ValueError(
            f"TrainConfig: min_lr is {config.min_lr} but learning_rate is {config.learning_rate}; expected min_lr <= "
            "learning_rate - lower one or raise the other"
        )
    for name in ("sequence_warmup", "compile"):
        if config.pack_documents and getattr(config, name):
            raise ValueError(f"TrainConfig: pack_documents and {name} exclude each other; leave one out")
    _check_objective(config)


def _check_objective(config: Any) -> None:
    masks = {"mlm_probability": 0.15, "whole_words": False, "no_next_sentence": False}
    given = next((name for name, usual in masks.items() if getattr(config, name) != usual), None)
    if config.objective == "lm" and given:
        raise ValueError(
            f"TrainConfig: `{given}` is {getattr(config, given)}, but `objective` is 'lm', a causal model without masks; use "
            "`objective` 'mlm', or leave it out"
        )
    for name in ("pack_documents", "sequence_warmup"):
        if config.objective == "mlm" and getattr(config, name):
            raise ValueError(f"TrainConfig: `{name}` is for `objective` 'lm', and it is 'mlm'; leave one out")
