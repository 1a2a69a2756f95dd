"""Mixtures: several texts read with given weights, as a file of sources says.

    [[source]]
    name = "wiki"
    data = "wiki.txt"     # as `gptfast train --data` takes it; a path is relative to this file
    weight = 3            # rows are drawn in proportion; the sum does not matter

Which source a row of the endless order comes from, and which of its windows it is, are functions of the row's number, the
seed and the weights. So a resumed run sees the rows of one that was not interrupted, with any number of processes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gptfast._files import read_toml
from gptfast.data.packing import Batch, inputs_and_targets, packed
from gptfast.data.sampler import WindowSampler, derived_seed, permute
from gptfast.data.token_file import TokenFile

_BLOCK = 4096  # rows in which every source has its share, to within one row
_MOST = 1e300  # weight, so that sums are finite
_LEAST = 2.0**-31  # share of a source: rows are dealt in blocks that have one of it
_KEYS = {"name": str, "data": str, "weight": (int, float), "glob": (str, list), "text_field": str}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Source:
    """A text of a mixture: its name, what `open_data` takes, and its part of the rows, in (0, 1]."""

    name: str
    data: str
    share: float
    glob: str | list[str] | None = None
    text_field: str | None = None


def is_mixture(data: Any) -> bool:
    """Whether `data` names a file of sources."""
    return str(data).endswith(".toml") and not Path(data).is_dir()


def read_mixture(path: str | Path) -> list[Source]:
    """The sources in a file; their shares sum to 1.

    Raises:
        OSError: the file cannot be read.
        ValueError, TypeError: no TOML, no sources, or a source with a wrong or missing key; the text names the source.
    """
    path = Path(path)
    content = read_toml(path)
    tables = content.get("source")
    if (
        not isinstance(tables, list)
        or not tables
        or not all(isinstance(table, dict) for table in tables)
        or set(content) != {"source"}
    ):
        raise ValueError(f"{path}: expected [[source]] tables with name, data and weight, and nothing else")
    names = [_checked(path, number, table) for number, table in enumerate(tables, 1)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two sources are named {twice[0]}; give each its own name")
    return [
        Source(table["name"], _place(path, table), share, table.get("glob"), table.get("text_field"))
        for table, share in zip(tables, _shares(path, tables), strict=True)
    ]


def _shares(path: Path, tables: list[dict[str, Any]]) -> list[float]:
    total = math.fsum(table["weight"] for table in tables)
    shares = [table["weight"] / total for table in tables]
    for table, share in zip(tables, shares, strict=True):
        if share < _LEAST:
            raise ValueError(
                f"{path}: source {table['name']}: weight is {table['weight']}, {share:.1g} of all; expected at least a row in "
                "2**31 - leave the source out, or give it more"
            )
    return shares


def _checked(path: Path, number: int, table: dict[str, Any]) -> str:
    """The name of a source whose keys and values are right."""
    here = f"{path}: source {table.get('name', number)}"
    for key in table:
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            raise ValueError(
                f"{here}: unknown key {key}; "
                + (f"did you mean {near[0]}?" if near else f"expected {', '.join(_KEYS)}")
            )
    for key in ("name", "data", "weight"):
        if key not in table:
            raise ValueError(f"{here}: {key} is missing")
    for key, value in table.items():
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise TypeError(f"{here}: {key} is {value!r}; expected {'a number' if key == 'weight' else 'text'}")
    if not _NAME.fullmatch(table["name"]):
        raise ValueError(f"{here}: a name has letters, digits, '.', '_' and '-'; it is the name of a folder")
    if not 0 < table["weight"] < _MOST:
        raise ValueError(
            f"{here}: weight is {table['weight']}; expected a finite number above 0 (leave the source out for 0)"
        )
    return table["name"]


def _place(path: Path, table: dict[str, Any]) -> str:
    data = table["data"]
    if data.partition(":")[0] == "shakespeare":
        return data
    place = path.parent / data
    if not place.exists():
        raise FileNotFoundError(
            f"{path}: source {table['name']}: {place} does not exist; data is relative to the file's folder"
        )
    return str(place.resolve())


@dataclass(frozen=True, eq=False)
class Mixture:
    """Training tokens of several sources.

    names, files, shares: of each source; the shares sum to 1.
    """

    names: tuple[str, ...]
    files: tuple[TokenFile, ...]
    shares: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def verify(self) -> None:
        """Compare the tokens of all sources with their checksums; see `TokenFile.verify`."""
        for file in self.files:
            file.verify()

    def epochs(self, rows: int, block_size: int) -> list[float]:
        """How often each source is read in this many rows."""
        return [
            rows * share / WindowSampler(file, block_size, 1).windows_per_epoch
            for file, share in zip(self.files, self.shares, strict=True)
        ]


class MixtureSampler:
    """Windows of block_size + 1 adjacent tokens from the sources of a mixture.

    Rows are dealt in blocks of 4096, or as many as give the rarest source a row: in each, every source has its share to
    within one row, in an order drawn for the block. A source's own rows go through its windows as `WindowSampler` does.

    Args:
        mixture, block_size, batch_size, seed, pack_documents: as in `WindowSampler`.
    Raises:
        ValueError: a source has too few tokens.
    """

    def __init__(
        self, mixture: Mixture, block_size: int, batch_size: int, seed: int = 0, pack_documents: bool = False
    ) -> None:
        self.batch_size, self._seed = batch_size, derived_seed(seed, len(mixture.files))
        sizes = (block_size, batch_size, seed, pack_documents)
        self._samplers = [_sampler(mixture, k, *sizes) for k in range(len(mixture.files))]
        shares = [Fraction(share) for share in mixture.shares]
        self._shares = [share / sum(shares) for share in shares]
        self._block = max(_BLOCK, math.ceil(1 / min(self._shares)))

    def batch_from(self, row: int) -> Batch:
        """x, y: (B, T) int64, the batch that begins with row number `row`; with pack_documents see `packed`."""
        sources, rows = self.places(np.arange(row, row + self.batch_size))
        pairs = zip(sources.tolist(), rows.tolist(), strict=True)
        taken, begins = zip(*(self._samplers[k].rows(np.array([n])) for k, n in pairs), strict=True)
        x, y = inputs_and_targets(np.concatenate(taken))
        return (x, y) if begins[0] is None else packed(x, y, np.concatenate(begins))

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) each: the source of each row, and the number of the row among those of its source."""
        sources, numbers = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        blocks, within = np.divmod(rows, self._block)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            before, after = self._dealt(block), self._dealt(block + 1)
            ends = np.cumsum([b - a for a, b in zip(before, after, strict=True)])
            place = permute(within[here], self._block, self._seed, block)
            source = np.searchsorted(ends, place, side="right")
            sources[here] = source
            numbers[here] = place - np.concatenate([[0], ends])[source] + np.array(before)[source]
        return sources, numbers

    def _dealt(self, block: int) -> list[int]:
        """Rows of each source before a block: shares by the largest remainder. They never fall, as each block has one of each."""
        wanted = [share * self._block * block for share in self._shares]
        counts = [math.floor(value) for value in wanted]
        by_remainder = sorted(range(len(wanted)), key=lambda k: (counts[k] - wanted[k], k))
        for k in by_remainder[: self._block * block - sum(counts)]:
            counts[k] += 1
        return counts


def _sampler(
    mixture: Mixture, k: int, block_size: int, batch_size: int, seed: int, pack_documents: bool
) -> WindowSampler:
    own = derived_seed(seed, k)
    try:
        return WindowSampler(mixture.files[k], block_size, batch_size, own, pack_documents=pack_documents)
    except ValueError as error:
        raise ValueError(f"source {mixture.names[k]}: {error}") from None


def sampler_of(
    tokens: TokenFile | Mixture | np.ndarray, block_size: int, batch_size: int, seed: int, pack_documents: bool = False
) -> WindowSampler | MixtureSampler:
    """The sampler of training tokens of either kind."""
    if isinstance(tokens, Mixture):
        return MixtureSampler(tokens, block_size, batch_size, seed, pack_documents)
    return WindowSampler(tokens, block_size, batch_size, seed, pack_documents=pack_documents)
