"""Which sizes are trained on how many tokens, from the time that a step of each takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# (layers, channels), from small to large: two layers at least, and 64 channels a layer beyond, as GPT-2 has
SHAPES = [(max(2, C // 64), C) for C in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)]
HEAD = 32  # channels of a head, where there are enough for two
# The sizes and the predicted one, as places after the smallest; the token counts of each size; steps of the shortest training.
# The first one for which there is time is taken, the last of them where there is nearly none.
GRIDS = [
    ((0, 1, 2, 3, 4), 5, 4, 100),
    ((0, 1, 2, 3, 4), 5, 3, 100),
    ((0, 1, 3, 4), 5, 3, 100),
    ((0, 2, 4), 5, 3, 100),
    ((0, 2, 4), 5, 3, 50),
    ((0, 2), 3, 3, 50),
    ((0, 2), 3, 3, 20),
]
RANGE = 10.5  # largest number of tokens by the smallest: an exponent needs a factor of 10
TOKENS_A_PARAMETER = 20  # of the largest size at least, where the budget allows: about what is optimal
EPOCHS = 4  # repeated text is nearly as good as new up to this number (Muennighoff et al., arXiv 2305.16264)
SHARE, OVERHEAD = 0.9, 0.2  # of the budget: what is planned; and most of what no step takes
LEARNING_RATE_RULE = (
    "AdamW; the largest rate is 0.05 / sqrt(channels), reached by a linear warm-up over a tenth of the steps (at most 100), then "
    "half a cosine to a tenth of it at the last step of each training"
)


@dataclass(frozen=True)
class Run:
    """A training: its shape, parameters (all but the position table), steps, tokens, and the seconds that it is planned to take."""

    n_layer: int
    n_embd: int
    parameters: int
    steps: int
    tokens: int
    seconds: float

    @property
    def flops(self) -> float:
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class Plan:
    """The trainings of a ladder.

    runs: of the ladder, the shortest first. predicted: the run of the size that is predicted and then trained."""

    runs: tuple[Run, ...]
    predicted: Run


def learning_rate(n_embd: int) -> float:
    """The largest learning rate of a training: `LEARNING_RATE_RULE`."""
    return 0.05 / math.sqrt(n_embd)


def heads_of(n_embd: int) -> int:
    return max(2, n_embd // HEAD)  # one head alone learns later: 2.89 instead of 2.81 after 68 steps of 32 channels


def make_plan(
    budget: float,
    spent: float,
    overhead: float,
    step_seconds: Callable[[int, int], float],
    parameters: Callable[[int, int], int],
    tokens_a_step: int,
    evaluation_steps: float,
    text_tokens: int,
) -> Plan:
    """The largest ladder that fits into a time.

    Of the sizes in `SHAPES` the largest ones are taken that see `TOKENS_A_PARAMETER`; of the numbers of runs in `GRIDS` the largest
    whose overhead is small.

    Args:
        budget, spent: seconds for all of it, and those that are gone already.
        overhead: seconds of each training beside its steps and its evaluation.
        step_seconds: measured, of a shape (layers, channels). It is asked from the smallest on, and no more than needed.
        parameters: of a shape.
        tokens_a_step, evaluation_steps: tokens of a step; the time of an evaluation in steps.
        text_tokens: of the training text.
    Raises:
        ValueError: too little time for two sizes.
    """
    best, seconds = None, budget - spent
    for places, predicted, lengths, shortest in GRIDS:
        least = math.ceil(shortest * RANGE)
        runs = len(places) * lengths + 1
        if overhead * runs > OVERHEAD * seconds and len(places) > 2:
            continue
        for start in range(len(SHAPES) - predicted):
            shapes = [SHAPES[start + place] for place in (*places, predicted)]
            costs = [step_seconds(*shape) for shape in shapes]
            shares = [RANGE ** -(n / (lengths - 1)) for n in range(lengths)]
            left = SHARE * seconds - overhead * runs - evaluation_steps * (lengths * sum(costs[:-1]) + costs[-1])
            steps = int(left / (sum(costs[:-1]) * sum(shares) + costs[-1]))
            steps = min(steps, max(EPOCHS * text_tokens // tokens_a_step, least))
            if steps < least:
                break
            if best and steps * tokens_a_step < TOKENS_A_PARAMETER * parameters(*shapes[-2]):
                break
            best = shapes, costs, [max(shortest, round(steps * share)) for share in shares]
        if best:
            break
    if best is None:
        raise ValueError(_too_small(budget, spent, overhead, step_seconds, evaluation_steps))
    shapes, costs, steps = best

    def run(shape: tuple[int, int], cost: float, steps: int) -> Run:
        time = cost * (steps + evaluation_steps) + overhead
        return Run(*shape, parameters(*shape), steps, steps * tokens_a_step, time)

    runs = [run(shape, cost, n) for shape, cost in zip(shapes[:-1], costs, strict=False) for n in steps]
    return Plan(tuple(sorted(runs, key=lambda run: run.seconds)), run(shapes[-1], costs[-1], steps[0]))


def _too_small(
    budget: float,
    spent: float,
    overhead: float,
    step_seconds: Callable[[int, int], float],
    evaluation_steps: float,
) -> str:
    places, predicted, lengths, shortest = GRIDS[-1]
    costs = [step_seconds(*SHAPES[place]) for place in (*places, predicted)]
    shares = sum(RANGE ** -(n / (lengths - 1)) for n in range(lengths))
    steps = math.ceil(shortest * RANGE) * (sum(costs[:-1]) * shares + costs[-1]) + evaluation_steps * (
        lengths * sum(costs[:-1]) + costs[-1]
    )
    needed = spent + (steps + overhead * (len(places) * lengths + 1)) / SHARE
    return (
        f"scaling: `budget` is {budget:.0f}s, too small for two sizes and one to predict; on this machine they take {needed:.0f} s, "
        f"give at least {math.ceil(1.1 * needed)}s"
    )
