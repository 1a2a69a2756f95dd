"""Schedules: the learning rate, and the length of rows."""

from __future__ import annotations

import math

from gptfast.training.config import WARMUP_STEPS, TrainConfig


def learning_rate(step: int, config: TrainConfig, total_steps: float) -> float:
    """Linear warm-up to learning_rate, then down to min_lr by `config.schedule`.

    Step s of W warm-up steps has the rate learning_rate * (s + 1) / W; step W has learning_rate. cosine: half a cosine
    (Loshchilov and Hutter, arXiv 1608.03983). linear: a line. wsd, warm-up, stable, decay: constant, then a line (Hu et al.,
    arXiv 2404.06395).

    Args:
        step: number of previous steps, >= 0.
        config: its learning_rate, min_lr, warmup_steps, lr_decay_steps, schedule and decay_share are used.
        total_steps: number of steps of the run; math.inf: not known yet, the rate stays at its largest.
    """
    end = total_steps if config.lr_decay_steps is None else config.lr_decay_steps
    warmup = config.warmup_steps
    if warmup is None:
        warmup = WARMUP_STEPS if end == math.inf else min(WARMUP_STEPS, int(end) // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, end - warmup))
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * progress)) / 2
    else:
        falling = 1.0 if config.schedule == "linear" else config.decay_share
        share = min(1.0, (1 - progress) / falling)
    return config.lowest_rate + (config.learning_rate - config.lowest_rate) * share


def row_length(step: int, block_size: int, config: TrainConfig) -> int:
    """Tokens of a row in a step: the divisors of T between `sequence_warmup_from` and T in turn, over `sequence_warmup` steps.

    Short rows first make early steps steadier (Li et al., arXiv 2108.06084); here rows are cut, and no token is left out.

    Args:
        step: number of previous steps, >= 0.
        block_size: T.
        config: of the run.
    Raises:
        ValueError: T has no divisor to begin with.
    """
    if not config.sequence_warmup:
        return block_size
    first = config.sequence_warmup_from or -(-block_size // 8)
    lengths = [length for length in range(first, block_size + 1) if block_size % length == 0]
    if len(lengths) < 2:
        raise ValueError(
            f"train: `sequence_warmup` cuts rows into equal parts, but block_size {block_size} has no divisor from {first} to "
            f"{block_size - 1}; choose another `block_size`, or a smaller `sequence_warmup_from`"
        )
    reached = first + (block_size - first) * min(1.0, step / config.sequence_warmup)
    return max((length for length in lengths if length <= reached), default=lengths[0])
