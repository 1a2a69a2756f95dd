"""The options of a run that is resumed: which may differ from those that it was started with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gptfast._files import absolute

MAY_CHANGE = frozenset(  # in every kind of run
    {
        *("max_steps", "learning_rate", "min_lr", "warmup_steps", "grad_clip", "batch_size", "grad_accum"),
        *("eval_every", "checkpoint_every", "patience", "log_every", "recompute"),
        *("threads", "dtype", "device", "out", "resume", "overwrite"),
    }
)


def refuse_changes(
    command: str,
    options: Mapping[str, Any],
    stored: Mapping[str, Any],
    may_change: Collection[str],
    run: str,
    remedy: str,
) -> None:
    """Check the options that were given for a run that is resumed against its own.

    Args:
        command: begins the message.
        options: those that were given.
        stored: the values of the run; paths in it are absolute, or as they were given.
        may_change: names of options that may differ.
        run: what is resumed, in words.
        remedy: ends the message: how to get the other value.
    Raises:
        ValueError: an option differs that may not.
    """
    for name, value in options.items():
        own = stored.get(name)
        if name not in may_change and value != own and absolute(value) != own:
            raise ValueError(
                f"{command}: `{name}` is {value} but {run} has {own}, which it cannot change; leave it out, or {remedy}"
            )
