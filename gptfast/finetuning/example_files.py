"""Files of examples: records with the fields of a task.

classification  text, label                      similarity  text1, text2, score
entailment      premise, hypothesis, label       choice      context, choices, label
chat            messages, or prompt and response             lm  text
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast._checks import check_choice
from gptfast._json import parse
from gptfast.data.columns import COLUMNS
from gptfast.data.records import CSV, kind_of, read_objects
from gptfast.finetuning.examples import target_of, texts_of
from gptfast.finetuning.instructions import check_conversation
from gptfast.finetuning.tasks import TARGETS, TASKS


@dataclass(frozen=True)
class Examples:
    """The examples of a file, all of them checked.

    path: the file. task: its task. records: the objects. where: "FILE, line N" of each.
    """

    path: Path
    task: str
    records: list[dict[str, Any]]
    where: list[str]

    def __len__(self) -> int:
        return len(self.records)

    def labels(self) -> list[str]:
        """The classes that occur, in the order of their names (of numbers: by size).

        Raises:
            ValueError: there is only one.
        """
        found = {str(record["label"]) for record in self.records}
        numbers = all(name.removeprefix("-").isdecimal() for name in found)
        names = sorted(found, key=(lambda name: (int(name), name)) if numbers else None)
        if len(names) < 2:
            raise ValueError(
                f"{self.path}: all {len(self)} examples have the label {names[0]!r}; a classifier needs examples of at least "
                "two classes"
            )
        return names


def read_examples(path: str | os.PathLike[str], task: str, labels: Sequence[str] | None = None) -> Examples:
    """Read and check the examples of a task.

    Args:
        path: JSON Lines, a JSON list, CSV or TSV with the names of the fields in the first line, also compressed (.gz, .bz2, .xz,
            .zst); Parquet or Arrow. In a cell of CSV choices and messages are JSON; a label that is a whole number is one.
        task: "classification", "entailment", "similarity", "choice", "lm" or "chat".
        labels: the classes that may occur; None: any.
    Raises:
        OSError: the file cannot be read.  ImportError: the file needs pyarrow.
        ValueError: an unknown task, no example, a damaged line, a field that is missing or of another kind, or a label that
            is not in the set. The message names the line.
    """
    check_choice("read_examples", "task", task, TASKS)
    path = Path(path)
    found = list(read_objects(path))
    if not found:
        raise ValueError(f"{path} has no examples; expected one a line")
    kind = kind_of(path.name)[0]
    if kind in CSV:
        found = [(where, _from_cells(record, where)) for where, record in found]
    elif kind in COLUMNS:  # a record lacks what is null
        found = [(where, {k: v for k, v in record.items() if v is not None}) for where, record in found]
    for where, record in found:
        _check(task, record, labels, where)
    return Examples(path, task, [record for _, record in found], [where for where, _ in found])


def _from_cells(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A record of CSV with the values that JSON would have."""
    values = dict(record)
    for name in ("choices", "messages"):
        if values.get(name) == "":
            del values[name]
        elif name in values:
            values[name] = parse(values[name], f"{where}, {name}")
    label, score = values.get("label"), values.get("score")
    if label is not None and label.removeprefix("-").isdecimal() and label not in values.get("choices", ()):
        values["label"] = int(label) if str(int(label)) == label else label
    if score is not None:
        with suppress(ValueError):  # what is no number is told with the others
            values["score"] = float(score)
    return values


def _check(task: str, record: dict[str, Any], labels: Sequence[str] | None, where: str) -> None:
    if task == "chat":
        check_conversation(record, where)
        return
    if task == "lm":
        if not isinstance(record.get("text"), str):
            got = f"text is {record['text']!r}" if "text" in record else "there is no field 'text'"
            raise ValueError(f"{where}: {got}; expected a text")
        return
    try:
        texts_of(task, record, where)
    except TypeError as error:  # of a file it is the content that is wrong
        raise ValueError(str(error)) from error
    label = record.get("label")
    if TARGETS[task] == "label" and task != "choice" and labels is None:
        if (
            isinstance(label, bool)
            or not isinstance(label, (str, int))
            or (isinstance(label, str) and not label.strip())
        ):
            got = f"label is {label!r}" if "label" in record else "there is no field 'label'"
            raise ValueError(f"{where}: {got}; expected the name or the number of a class")
        return
    target_of(task, record, labels or (), where)
