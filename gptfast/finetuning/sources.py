"""The examples of a run: training and held-out ones, and their fingerprints."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gptfast.data.sampler import shuffled
from gptfast.finetuning.example_files import Examples, read_examples
from gptfast.finetuning.examples import target_of
from gptfast.finetuning.task_checks import ENTAILMENT
from gptfast.finetuning.tasks import FIELDS

_HELD_OUT = 10  # one example in this many is held out, where no file of held-out examples is given


@dataclass(frozen=True)
class Data:
    """The examples of a run, divided into training and held-out ones.

    train, held_out: the examples. labels: the classes, [] for tasks without."""

    train: Examples
    held_out: Examples
    labels: list[str]

    def marks(self) -> dict[str, list[int]]:
        """The number of examples of each part, and a checksum of them."""
        return {"train": _mark(self.train), "held_out": _mark(self.held_out)}

    def notes(self) -> list[str]:
        """Sentences for the user about examples that judge the model wrongly."""
        learnt, notes = set(_contents(self.train)), []
        if again := sum(content in learnt for content in _contents(self.held_out)):
            notes.append(
                f"{again} of those to judge by are learnt from too, so the figures are better than they should be"
            )
        if self.held_out.task == "similarity":
            scores = {float(record["score"]) for record in self.held_out.records}
            notes += [
                f"all scores to judge by are {score:g}: no correlation can be told"
                for score in scores
                if len(scores) == 1
            ]
        counts, held = self.counts(), _found(self.held_out, self.labels) if self.labels else Counter()
        unseen = [label for n, label in enumerate(self.labels) if held[n] and not counts[label]]
        if unseen:
            notes.append(f"{', '.join(unseen)}: among those to judge by, but not among those to learn from")
        return notes

    def counts(self) -> dict[str, int]:
        """How often each class occurs in the training part."""
        if not self.labels:
            return {}
        found = _found(self.train, self.labels)
        return {label: found[n] for n, label in enumerate(self.labels)}


def open_examples(data: str, eval_data: str | None, task: str, seed: int, labels: Sequence[str] | None) -> Data:
    """The examples of a run.

    Args:
        data, eval_data: files; without eval_data every tenth example, drawn by seed, is held out.
        task: of the examples.
        seed: of the draw.
        labels: the classes of a head that there is already; None: those of `data`.
    Raises:
        OSError: a file cannot be read.
        ValueError: damaged lines, a label that is not in the set, one class only, too few examples.
    """
    classes = task in ("classification", "entailment")
    found = read_examples(data, task, labels)
    names = list(labels or _labels(found, task)) if classes else []
    if eval_data is not None:
        return _checked(Data(found, read_examples(eval_data, task, names if classes else None), names))
    n = len(found)
    if n < 2:
        raise ValueError(
            f"{found.path} has {n} example, and none would be left to judge by; give more, or a file of them with `eval_data`"
        )
    order = [int(i) for _, part in shuffled(0, n, n, seed) for i in part]
    held = set(order[: max(1, n // _HELD_OUT)])
    parts = [[i for i in range(n) if (i in held) is wanted] for wanted in (False, True)]
    train, held_out = (_some(found, part) for part in parts)
    return _checked(Data(train, held_out, names))


def _labels(found: Examples, task: str) -> list[str]:
    """The classes of a file; those of entailment in the usual order, also where one of them does not occur."""
    names = found.labels()
    return list(ENTAILMENT) if task == "entailment" and set(names) <= set(ENTAILMENT) else names


def _checked(data: Data) -> Data:
    """The data. Raises ValueError where all training examples are of one class."""
    counts = data.counts()
    present = [label for label, n in counts.items() if n]
    if len(present) == 1:
        raise ValueError(
            f"{data.train.path}: {present[0]!r} of {', '.join(counts)} is the only class of its {len(data.train)} training "
            "examples; give examples of others too"
        )
    return data


def _some(examples: Examples, numbers: list[int]) -> Examples:
    records, where = ([values[i] for i in numbers] for values in (examples.records, examples.where))
    return replace(examples, records=records, where=where)


def _found(examples: Examples, labels: Sequence[str]) -> Counter[int | float]:
    """How often each class occurs, by its index."""
    return Counter(target_of(examples.task, record, labels) for record in examples.records)


def _contents(examples: Examples) -> list[str]:
    """The texts of each example, without its label or score."""
    names = {**FIELDS, "lm": ("text",), "chat": ("messages", "prompt", "response")}[examples.task]
    return [json.dumps([record.get(name) for name in names], sort_keys=True) for record in examples.records]


def _mark(examples: Examples) -> list[int]:
    """Their number, and a checksum."""
    return [len(examples), zlib.crc32(json.dumps(examples.records, sort_keys=True).encode())]


def class_weights(text: str | None, data: Data) -> dict[str, float] | None:
    """The weights of the classes that an option says: "balanced", or LABEL=NUMBER with commas.

    Raises:
        ValueError: something else, or a label that is not in the set.
    """
    if text is None:
        return None
    if text == "balanced":  # as scikit-learn's class_weight: the mean weight of an example is 1
        counts = data.counts()
        return {k: len(data.train) / (len(counts) * n) if n else 0.0 for k, n in counts.items()}
    weights: dict[str, float] = {}
    for part in text.split(","):
        label, equals, number = part.rpartition("=")
        if not equals or label.strip() not in data.labels:
            raise ValueError(
                f"finetune: class_weights has {part!r}; expected LABEL=NUMBER with a label of {', '.join(data.labels)}"
            )
        if label.strip() in weights:
            raise ValueError(f"finetune: class_weights has two weights for {label.strip()!r}; give one")
        weights[label.strip()] = _number(number, part)
    return weights


def _number(text: str, part: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"finetune: class_weights has {part!r}; expected LABEL=NUMBER") from None
