"""How the learning rate moves over the steps."""

from __future__ import annotations

import math

from gptfast.training.config import WARMUP_STEPS, TrainConfig


def learning_rate(step: int, config: TrainConfig, total_steps: float) -> float:
    """Linear warm-up to learning_rate, then half a cosine to min_lr (Loshchilov and Hutter, arXiv 1608.03983).

    Step s of the warm-up W has rate learning_rate * (s + 1) / W; step W has all of it.

    Args:
        step: steps made before this one, >= 0.
        config: uses learning_rate, min_lr, warmup_steps and lr_decay_steps.
        total_steps: of the run; math.inf while it is not known (the rate then stays at its largest).
    """
    end = total_steps if config.lr_decay_steps is None else config.lr_decay_steps
    warmup = config.warmup_steps
    if warmup is None:
        warmup = WARMUP_STEPS if end == math.inf else min(WARMUP_STEPS, int(end) // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, end - warmup))
    share = (1 + math.cos(math.pi * progress)) / 2
    return config.lowest_rate + (config.learning_rate - config.lowest_rate) * share
