"""The options of `gptfast scaling`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gptfast._options import Whole, check_fields, describe_fields, device_option, option

_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


@describe_fields
@dataclass(frozen=True)
class LadderOptions:
    """A ladder of trainings.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    budget: str = option(
        "25m",
        "Wall time for all of it: 90s, 25m, 2h, 1h30m. Sizes and numbers of tokens are planned from the measured speed of this "
        "machine.",
    )
    out: Path = option(Path("runs/scaling"), "Folder for points.jsonl, results.json and scaling.png.")
    resume: bool = option(
        False,
        "Continue the ladder in OUT: points that are measured stay, and a training that was cut off begins again.",
    )
    batch_size: int = option(8, "Rows of text in a step, the same for all sizes.", allowed=Whole(1))
    block_size: int = option(128, "Tokens of a row.", allowed=Whole(1))
    seed: int = option(
        0, "Seed of the initial weights, of the order of the text, and of the draws for intervals.", allowed=Whole()
    )
    device: str = device_option()

    def __post_init__(self) -> None:
        check_fields("LadderOptions", self)
        self.seconds  # noqa: B018  checks the budget

    @property
    def seconds(self) -> float:
        """The budget in seconds. Raises ValueError where it is no time above 0."""
        found = _TIME.fullmatch(self.budget.strip()) if isinstance(self.budget, str) else None
        parts = [float(part or 0) for part in found.groups()] if found else [0.0]
        seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
        if not seconds:
            raise ValueError(
                f"scaling: `budget` is {self.budget!r}; expected a time above 0 with its unit, such as 90s, 25m or 1h30m"
            )
        return seconds
