"""Examples of tasks as rows of token ids, with the delimiters of GPT-1 (Radford et al. 2018, section 3.3).

classification  [BOS] text [EOS]
entailment      [BOS] premise [SEP] hypothesis [EOS]
similarity      [BOS] text1 [SEP] text2 [EOS]  and  [BOS] text2 [SEP] text1 [EOS]
choice          [BOS] context [SEP] choice [EOS]  for each choice
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.finetuning.special_tokens import BOS, EOS, PAD, SEP
from gptfast.finetuning.tasks import FIELDS, TARGETS

DELIMITERS = {task: (BOS, EOS, PAD) if task == "classification" else (BOS, SEP, EOS, PAD) for task in FIELDS}

Row = list[int]


def texts_of(task: str, example: Any, where: str = "") -> list[Any]:
    """The texts of an example in the order of `FIELDS`.

    Args:
        task: its name.
        example: an object with the fields of the task, or the texts themselves: one str, or a tuple or list of them.
        where: file and line of the example, for messages; "": the example itself.
    Raises:
        TypeError, ValueError: a field is missing, or is no text.
    """
    names, where = FIELDS[task], where or f"TaskModel({task!r})"
    if isinstance(example, Mapping):
        missing = [name for name in names if name not in example]
        if missing:
            raise ValueError(
                f"{where}: there is no field {missing[0]!r}; expected {', '.join(names)} - it has "
                f"{', '.join(map(repr, example)) or 'none'}"
            )
        values = [example[name] for name in names]
    elif len(names) == 1:
        values = [example]
    elif isinstance(example, (tuple, list)) and len(example) == len(names):
        values = list(example)
    else:
        raise TypeError(f"{where}: the example is a {type(example).__name__}; expected the fields {', '.join(names)}")
    for name, value in zip(names, values, strict=True):
        if name == "choices":
            _check_choices(value, where)
        elif not isinstance(value, str):
            raise TypeError(f"{where}: {name} is {value!r}; expected a text")
    return values


def _check_choices(value: Any, where: str) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(c, str) for c in value):
        raise TypeError(f"{where}: choices is {value!r}; expected a list of texts")
    if len(value) < 2:
        raise ValueError(f"{where}: choices has {len(value)} text; expected at least two")


def target_of(task: str, example: Mapping[str, Any], labels: Sequence[str], where: str = "") -> int | float:
    """What is to be predicted: the index of a class or choice, or a score.

    Args:
        task: its name.
        example: with `TARGETS[task]`; a choice by its text or its index, a class by its name in `labels`, or by its index where
            no class is called by a number.
        labels: names of the classes.
        where: as `texts_of`.
    Raises:
        TypeError, ValueError: no such field, a label that is not in the set, or a score that is no number.
    """
    name, where = TARGETS[task], where or f"TaskModel({task!r})"
    if name not in example:
        raise ValueError(f"{where}: there is no field {name!r}; it has {', '.join(map(repr, example)) or 'none'}")
    value = example[name]
    if task == "similarity":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{where}: score is {value!r}; expected a finite number")
        return float(value)
    known = list(example["choices"]) if task == "choice" else list(labels)
    if isinstance(value, str) and value in known:
        if known.count(value) > 1:
            raise ValueError(
                f"{where}: the label {value!r} is the text of several choices; give the index of the right one"
            )
        return known.index(value)
    if isinstance(value, int) and not isinstance(value, bool):
        numbered = task != "choice" and any(map(_is_number, known))  # classes that are called 1, 2, …
        if numbered and str(value) in known:
            return known.index(str(value))
        if not numbered and 0 <= value < len(known):
            return value
    raise ValueError(f"{where}: the label {value!r} is not in the set; expected one of {', '.join(map(repr, known))}")


def encoded(encode: Callable[[str], list[int]], text: str, where: str) -> list[int]:
    """encode(text). where: file and line of the text, for messages; "": not said.

    Raises:
        ValueError: the tokenizer has no token for a part of it.
    """
    try:
        return encode(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


class Encoder:
    """Turns examples into rows, and counts those that were too long.

    A row longer than `room` is cut: the longer of its texts loses tokens at its end until the row fits; delimiters stay.

    Args:
        task: its name.
        tokens: name of a delimiter -> id, or None for none; see `task_tokens`.
        encode: text -> ids.
        room: tells the longest row.
    """

    def __init__(
        self, task: str, tokens: Mapping[str, int | None], encode: Callable[[str], list[int]], room: Callable[[], int]
    ) -> None:
        self.task, self.encode, self.room = task, encode, room
        self.tokens = {name: [] if i is None else [i] for name, i in tokens.items()}
        self.cut = 0  # examples with a row that was too long

    def rows(self, example: Any, where: str = "") -> list[Row]:
        """The rows of an example.

        Raises:
            TypeError, ValueError: see `texts_of`; a text that the tokenizer does not encode; or nothing of the texts has room.
        """
        pairs = self._pairs(texts_of(self.task, example, where))
        found = [[encoded(self.encode, text, where) for text in texts] for texts in pairs]
        lengths = [sum(map(len, texts)) for texts in found]
        rows = [self._row(texts) for texts in found]
        kept = [len(row) - self._overhead(len(texts)) for row, texts in zip(rows, found, strict=True)]
        self.cut += kept != lengths
        for row in rows:
            if not row:
                raise ValueError(
                    f"{where or f'TaskModel({self.task!r})'}: the text is empty; expected at least one token"
                )
        return rows

    def _pairs(self, values: list[Any]) -> list[list[str]]:
        if self.task == "similarity":
            return [values, values[::-1]]
        if self.task == "choice":
            return [[values[0], choice] for choice in values[1]]
        return [values]

    def _overhead(self, texts: int) -> int:
        return sum(len(self.tokens.get(name, [])) for name in (BOS, *(SEP,) * (texts - 1), EOS))

    def _row(self, texts: list[Row]) -> Row:
        limit = self.room()
        room = limit - self._overhead(len(texts))
        if room < len(texts):
            raise ValueError(
                f"TaskModel: a row has {limit} positions (block_size less virtual tokens), of which the delimiters of {self.task} "
                f"leave {max(room, 0)}; expected at least one for each text"
            )
        row = list(self.tokens.get(BOS, []))
        for n, ids in enumerate(fitted(texts, room)):
            row += [*(self.tokens.get(SEP, []) if n else []), *ids]
        return row + self.tokens.get(EOS, [])


def fitted(texts: list[Row], room: int) -> list[Row]:
    """Texts cut at their ends to at most `room` tokens in all, the longest first (of equals the last)."""
    lengths = [len(text) for text in texts]
    while (over := sum(lengths) - room) > 0:
        longest = max(range(len(lengths)), key=lambda n: (lengths[n], n))
        others = max((length for n, length in enumerate(lengths) if n != longest), default=0)
        lengths[longest] -= min(over, max(1, lengths[longest] - others))
    return [text[:length] for text, length in zip(texts, lengths, strict=True)]


def padded(groups: Sequence[Sequence[Row]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids (B, N, T) of B groups of up to N rows, padded on the right, and 1 where they are real."""
    N, T = max(map(len, groups)), max(len(row) for rows in groups for row in rows)
    ids = torch.full((len(groups), N, T), pad, dtype=torch.int64, device="cpu")
    mask = torch.zeros(ids.shape, dtype=torch.int64, device="cpu")
    for n, rows in enumerate(groups):
        for m, row in enumerate(rows):
            ids[n, m, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
            mask[n, m, : len(row)] = 1
    return ids, mask
