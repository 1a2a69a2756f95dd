"""TrainConfig: every choice of a training run, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

_CHOICES = {"optimizer": ("adamw", "muon"), "dtype": ("auto", "float32", "bfloat16")}
WARMUP_STEPS = 100


@dataclass(frozen=True)
class TrainConfig:
    """How a GPT is trained. A step is one update of the weights.

    Args:
        batch_size: B, rows of one forward and backward pass.
        grad_accum: passes whose gradients are summed into one step; a step sees batch_size * grad_accum rows.
        block_size: T, tokens of one row; None: the longest that the model takes.
        max_steps: how many steps to train; None: no limit, which needs max_minutes.
        max_minutes: wall-clock time for all of the training, evaluations and checkpoints included. The number of
            steps that fit is planned from the measured speed, and again after every step.
        optimizer: "adamw", or "muon" for the matrices inside the blocks and AdamW for the rest: it learns more from a
            token, and takes longer for a step (see `build_optimizers`).
        learning_rate: the largest one, reached after the warm-up.
        min_lr: where the cosine ends; None: learning_rate / 10 (Brown et al., arXiv 2005.14165, appendix B).
        warmup_steps: steps over which the rate rises linearly; None: 100, or a tenth of all steps if that is less.
        lr_decay_steps: the step at which the cosine ends; None: the last one.
        weight_decay: decoupled decay of the matrices and embeddings; biases and LayerNorms have none.
        beta1, beta2: of AdamW (the defaults are GPT-3's).
        grad_clip: largest norm of the gradient; 0 turns clipping off.
        eval_every: steps between evaluations.
        eval_batches: batches of validation windows, the same ones each time; 0: all of the validation data.
        checkpoint_every: steps between checkpoints; None: eval_every.
        log_every: steps between records in the log.
        seed: of the initial weights, the dropout and the order of the data; in [0, 2**63). Runs of one config and data
            are equal bit for bit on one machine, but for the number of steps under max_minutes.
        dtype: of the matrix products: "bfloat16" (autocast, weights stay float32), "float32", or "auto": bfloat16
            where the CPU (AVX-512 BF16, AMX) or GPU has instructions for it, else float32.
        device: "cpu", "cuda" (or "cuda:1", ...), or "auto": cuda where there is one.
    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or two that contradict each other.
    """

    batch_size: int = 32
    grad_accum: int = 1
    block_size: int | None = None
    max_steps: int | None = 2000
    max_minutes: float | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    min_lr: float | None = None
    warmup_steps: int | None = None
    lr_decay_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    eval_every: int = 250
    eval_batches: int = 20
    checkpoint_every: int | None = None
    log_every: int = 10
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, (least, optional) in _COUNTS.items():
            _check_count(name, getattr(self, name), least, optional)
        for name, (expected, holds, optional) in _NUMBERS.items():
            _check_number(name, getattr(self, name), expected, holds, optional)
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("TrainConfig: max_steps and max_minutes are both None; give at least one of them")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                got = getattr(self, name)
                raise ValueError(f"TrainConfig: {name} is {got!r}; expected one of {', '.join(choices)}")
        if not isinstance(self.device, str):
            raise TypeError(f"TrainConfig: device is {self.device!r}; expected a str such as 'cpu' or 'cuda'")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(
                f"TrainConfig: min_lr is {self.min_lr} but learning_rate is {self.learning_rate}; expected min_lr <= "
                "learning_rate - lower one or raise the other"
            )
        if self.seed >= 2**63:
            raise ValueError(f"TrainConfig: seed is {self.seed}; expected a seed in [0, 2**63)")

    def replace(self, **changes: Any) -> TrainConfig:
        """A checked copy with some fields changed.

        Raises:
            TypeError: an unknown field.
        """
        names = [f.name for f in fields(self)]
        for name in changes:
            if name not in names:
                raise TypeError(f"TrainConfig has no field {name!r}; it has {', '.join(names)}")
        return replace(self, **changes)

    @property
    def rows_per_step(self) -> int:
        """Rows of tokens that one step sees."""
        return self.batch_size * self.grad_accum

    @property
    def lowest_rate(self) -> float:
        """Where the cosine ends."""
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def steps_per_checkpoint(self) -> int:
        return self.eval_every if self.checkpoint_every is None else self.checkpoint_every


_COUNTS = {  # name: (least value, may be None)
    "batch_size": (1, False),
    "grad_accum": (1, False),
    "block_size": (1, True),
    "max_steps": (1, True),
    "warmup_steps": (0, True),
    "lr_decay_steps": (1, True),
    "eval_every": (1, False),
    "eval_batches": (0, False),
    "checkpoint_every": (1, True),
    "log_every": (1, False),
    "seed": (0, False),
}
_NUMBERS = {  # name: (expected, test, may be None)
    "max_minutes": ("a number > 0", lambda x: 0 < x < math.inf, True),
    "learning_rate": ("a number > 0, such as 1e-3", lambda x: 0 < x < math.inf, False),
    "min_lr": ("a number >= 0", lambda x: 0 <= x < math.inf, True),
    "weight_decay": ("a number >= 0, such as 0.1", lambda x: 0 <= x < math.inf, False),
    "beta1": ("a number in [0, 1)", lambda x: 0 <= x < 1, False),
    "beta2": ("a number in [0, 1)", lambda x: 0 <= x < 1, False),
    "grad_clip": ("a number >= 0, such as 1.0 (0: no clipping)", lambda x: 0 <= x < math.inf, False),
}


def _check_count(name: str, value: Any, least: int, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"TrainConfig: {name} is {value!r}; expected an int" + (" or None" if optional else ""))
    if value < least:
        raise ValueError(f"TrainConfig: {name} is {value}; expected at least {least}")


def _check_number(name: str, value: Any, expected: str, holds: Any, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"TrainConfig: {name} is {value!r}; expected {expected}")
    if not holds(value):
        raise ValueError(f"TrainConfig: {name} is {value}; expected {expected}")
