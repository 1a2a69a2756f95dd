"""Detection of bad steps: a loss or a gradient norm that is not finite, or far above those of the steps before."""

from __future__ import annotations

import math
import statistics

RECENT = 50  # steps that a step is compared with
_LEAST = 10  # steps before anything is compared
_LOSS, _DEVIATIONS = 1.0, 8.0  # nats, and scaled absolute deviations, above the median
_NORM = 20.0  # times the median
_ENOUGH = 10  # bad steps in a row at which the run stops


def what_is_wrong(loss: float, norm: float, recent: list[list[float]]) -> str:
    """A description of what is wrong with a step, "" where nothing is.

    The loss spikes where it lies above the median of the last 50 steps by more than 1 nat and by more than 8 median absolute
    deviations (times 1.4826, a standard deviation where they are normal); the norm of the gradient where it is above 20
    times its median. Before 10 steps only numbers that are not finite are wrong.

    Args:
        loss, norm: of the step; norm before clipping.
        recent: [loss, norm] of the steps before, the newest last.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"the loss is {loss:.6g} and the norm of its gradient {norm:.6g}"
    if len(recent) < _LEAST:
        return ""
    losses, norms = [pair[0] for pair in recent], [pair[1] for pair in recent]
    middle = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in losses)
    if loss > middle + max(_LOSS, _DEVIATIONS * spread):
        return f"the loss is {loss:.4f}, far above the {middle:.4f} of the steps before"
    if norm > _NORM * statistics.median(norms):
        return (
            f"the norm of the gradient is {norm:.4g}, far above the {statistics.median(norms):.4g} of the steps before"
        )
    return ""


def remember(recent: list[list[float]], loss: float, norm: float) -> None:
    """Add a step that went well, and forget the oldest."""
    recent.append([loss, norm])
    del recent[:-RECENT]


def too_many(in_a_row: int) -> bool:
    """Whether too many steps in a row went wrong for the data to be the cause."""
    return in_a_row >= _ENOUGH


def beyond(row: int, rows: int, left_out: list[list[int]]) -> int:
    """The first row from `row` on at which a step of at most `rows` rows meets none of the rows that are left out.

    Args:
        left_out: [first, count] of each group.
    """
    for first, count in sorted(left_out):
        if row < first + count and first < row + rows:
            row = first + count
    return row
