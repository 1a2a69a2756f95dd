"""Fields of a TrainConfig that contradict each other, or change nothing without another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptfast._options import default_of, format_value

# Fields that change nothing without another one: by field, that one, and the value it needs; "": any but 0.
_NEEDS = {
    "decay_share": ("schedule", "wsd"),
    "sequence_warmup_from": ("sequence_warmup", ""),
    "batch_warmup_from": ("batch_warmup_tokens", ""),
}


def with_effect(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a TrainConfig without those that change nothing, which it refuses: older versions took and stored them.

    Args:
        kind: TrainConfig.
        values: by field; those that are missing have their defaults.
    """
    return {name: value for name, value in values.items() if not _is_idle(kind, values, name)}


def _is_idle(kind: type, values: Mapping[str, Any], name: str) -> bool:
    """Whether a value is not the default, and changes nothing."""
    if name not in _NEEDS or values[name] == default_of(kind, name):
        return False
    other, needed = _NEEDS[name]
    chosen = values.get(other, default_of(kind, other))
    return chosen != needed if needed else not chosen


def check_together(config: Any) -> None:
    """Raises ValueError: two fields of a TrainConfig contradict each other, or one has no effect."""
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
    for name, (other, needed) in _NEEDS.items():
        if _is_idle(type(config), vars(config), name):
            raise ValueError(
                f"TrainConfig: `{name}` is {format_value(getattr(config, name))}, but has no effect without `{other}`"
                + (f" {needed}" if needed else "")
                + f"; give it too, or leave `{name}` out"
            )


def _check_objective(config: Any) -> None:
    masks = {"mlm_probability": 0.15, "whole_words": False, "no_next_sentence": False}
    given = next((name for name, usual in masks.items() if getattr(config, name) != usual), None)
    if config.objective == "lm" and given:
        raise ValueError(
            f"TrainConfig: `{given}` is {getattr(config, given)}, but `objective` is 'lm', a causal model without masks; use "
            "`objective` 'mlm', or leave it out"
        )
    for name in ("pack_documents", "sequence_warmup", "router_aux_loss_coef"):
        if config.objective == "mlm" and getattr(config, name):
            raise ValueError(f"TrainConfig: `{name}` is for `objective` 'lm', and it is 'mlm'; leave one out")
