"""Filters of documents: by length, and of near-duplicates."""

from __future__ import annotations

from dataclasses import dataclass

from gptfast._options import Whole, check_fields, option


@dataclass(frozen=True)
class Filters:
    """Which documents to leave out.

    Raises:
        TypeError, ValueError: a value that is not allowed.
    """

    min_chars: int | None = option(
        None, "Leave out documents of fewer characters.", words="no limit", allowed=Whole(1), group="Filters"
    )
    max_chars: int | None = option(
        None, "Leave out documents of more characters.", words="no limit", allowed=Whole(1), group="Filters"
    )
    drop_near_duplicates: bool = option(
        False,
        "Leave out documents that are nearly the same as an earlier one: MinHash over 5 words in a row, as FineWeb's; of two with "
        "three quarters of these in common three of four pairs are found, with nine tenths all.",
        group="Filters",
    )

    def __post_init__(self) -> None:
        check_fields("prepare", self)
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(
                f"prepare: min_chars is {self.min_chars} but max_chars is {self.max_chars}; expected min_chars <= max_chars"
            )

    def keeps(self, characters: int) -> bool:
        """Whether a document of this length is kept."""
        return (self.min_chars is None or characters >= self.min_chars) and (
            self.max_chars is None or characters <= self.max_chars
        )
