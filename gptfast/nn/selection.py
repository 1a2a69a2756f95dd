"""Which adapters each row of a batch has in a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

BASE = "__base__"  # in adapter_names: a row without an adapter


@dataclass(frozen=True)
class Part:
    """Rows of a batch under the same adapters, which are added up. first, last: rows; names: of the adapters."""

    first: int
    last: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The adapters of one forward.

    rows: B; 0: one part stands for all rows, however many these are.
    rng: seed and first Philox offset of the dropouts before A, of which each module takes one; None: no dropout.
    """

    rows: int
    parts: tuple[Part, ...]
    rng: tuple[int, int] | None = None

    def spans(self, rows: int) -> Iterator[tuple[int, int, tuple[str, ...]]]:
        """(first, last, names) of each part, for `rows` rows of a module's input, which are B times as many as each has."""
        per = rows // self.rows if self.rows else 0
        for part in self.parts:
            yield (part.first * per, part.last * per, part.names) if self.rows else (0, rows, part.names)


@dataclass
class AdapterState:
    """What the modules of a model with adapters share.

    active: names of the adapters of a forward without adapter_names; their updates are added up.
    enabled: False: no forward uses any, whatever its adapter_names say, as in peft.
    names: of all adapters of the model.
    drops: whether one of them has dropout.
    merged: names of those that are merged into the weights.
    watched: whether a backward pass has been checked, told: the names of rows; see `gptfast.nn.adapter_watch`.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True

    names: tuple[str, ...] = ()
    drops: bool = False
    merged: tuple[str, ...] = ()
    watched: bool = False
    told: bool = False

    def selection(self, rng: tuple[int, int] | None = None) -> Selection:
        """The selection of a forward without adapter_names."""
        return Selection(0, (Part(0, 0, self.active if self.enabled else ()),), rng)


def select_rows(state: AdapterState, adapter_names: Any, rows: int, rng: tuple[int, int] | None) -> Selection:
    """The selection of adapter_names, one for each of `rows` rows; while adapters are disabled, that of the base.

    Raises:
        TypeError, ValueError: no list of names, another number of them, an unknown one, or adapters are merged.
    """
    wanted = one_a_row("GPT", adapter_names, rows)
    check_separate("GPT", state)
    for name in wanted:
        check_adapter("GPT", state.names, name)
    if not state.enabled:
        return state.selection(rng)
    parts, first = [], 0
    for row in range(1, rows + 1):
        if row == rows or wanted[row] != wanted[first]:
            parts.append(Part(first, row, () if wanted[first] == BASE else (wanted[first],)))
            first = row
    return Selection(rows, tuple(parts), rng)


def one_a_row(op: str, adapter_names: Any, rows: int) -> list[str]:
    """The list in adapter_names. Raises TypeError or ValueError where it does not hold one name a row."""
    given = isinstance(adapter_names, Sequence) and not isinstance(adapter_names, str)
    if not given or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"{op}: adapter_names is {adapter_names!r}; expected a list of names, one a row")
    if len(adapter_names) != rows:
        raise ValueError(
            f"{op}: adapter_names has {len(adapter_names)} names and the batch {rows} rows; expected one a row"
        )
    return list(adapter_names)


def check_separate(op: str, state: AdapterState) -> None:
    """Raise ValueError where adapters are merged: the weights of all rows are then theirs."""
    if state.merged:
        raise ValueError(
            f"{op}: adapter_names is given while {', '.join(map(repr, state.merged))} is merged into the weights of all rows; call "
            "unmerge_adapter() first"
        )


def check_adapter(op: str, names: Sequence[str], name: Any) -> None:
    """Raise ValueError for a name in adapter_names that is neither in `names` nor "__base__"."""
    if name != BASE and name not in names:
        known = ", ".join(map(repr, (*names, BASE)))
        raise ValueError(f"{op}: adapter_names has {name!r}, which is no adapter of this model; it has {known}")


def known_adapters(op: str, names: Sequence[str], wanted: str | Sequence[str]) -> tuple[str, ...]:
    """`wanted` as a tuple, each name once. Raises ValueError for one that is not in `names`, those that the model has."""
    chosen = (wanted,) if isinstance(wanted, str) else tuple(dict.fromkeys(wanted))
    for name in chosen:
        if name not in names:
            has = ", ".join(map(repr, names)) or "none"
            raise ValueError(f"{op}: there is no adapter {name!r}; the model has {has}")
    return chosen


def check_one_prompt(op: str, prompts: Sequence[str]) -> None:
    """Raise ValueError where several of the adapters that are active together are soft prompts, these."""
    if len(prompts) > 1:
        raise ValueError(
            f"{op}: {', '.join(map(repr, prompts))} are soft prompts, of which a row has one; activate one of them"
        )
