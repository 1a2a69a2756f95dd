"""Tasks for in-context learning, from Shakespeare's texts or generated, or from a file.

genre       the genre of a passage: comedy, history, tragedy or poetry
cloze       the last word of a passage (the form of LAMBADA, Paperno et al., arXiv 1606.06031)
copying     words again, in their order
reversal    words again, from the last to the first
addition    the sum of two numbers of two digits
arithmetic  word problems of two steps, with the reasoning that leads to the answer
induction   what followed a word when it stood in the text before: A B … A -> B (Olsson et al., arXiv 2209.11895)
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast._files import read_text
from gptfast.data import load_documents
from gptfast.data.corpus import GENRES
from gptfast.data.records import read_objects
from gptfast.evaluation.templates import Item, Template, load_template

ITEMS, POOL = 200, 64
_WORDS = re.findall(
    r"\w+",
    "apple river stone candle window garden horse silver bridge music paper winter doctor forest letter table ocean king "
    "bread mountain star glass flower road ship bird house queen book tree",
)
_PASSAGE = 240  # characters
_ANSWERS = ("label", "target", "answer")  # fields that hold an item's answer
_PEOPLE, _THINGS = ("Ann", "Ben", "Carla", "David", "Eva", "Frank"), ("pens", "apples", "stamps", "marbles", "books")


@dataclass(frozen=True)
class Task:
    """template: of the prompts. items: to solve. pool: solved items to show before; an item is never shown before itself.

    labels: those to choose from; None: an item's own answer must be the most likely text.
    target: the field that holds the label or the answer.
    spare: solved items to show where the pool has too few.
    """

    name: str
    template: Template
    items: Sequence[Item]
    pool: Sequence[Item]
    labels: Sequence[str] | None = None
    target: str = "label"
    spare: Sequence[Item] = ()


def load_task(
    task: str | os.PathLike[str],
    template: str | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Task:
    """A task of this module, or one in a file.

    Args:
        task: a name, or a file of JSON Lines with an object an item. All are solved. The shots before one are others of them,
            which have all fields of the template's own examples, such as `reasoning`, and then these examples.
        template: a shipped one (`load_template`), or a Jinja2 file; None: the one with the task's name.
        labels: to choose from; None: with a name, the task's own; with a file, none: the answer must be the most likely text.
        seed: of the generated items.
    Raises:
        FileNotFoundError, ValueError: no such task or template, an item without an answer or with one that is no label.
    """
    if str(task) in TASKS:
        items, own = TASKS[str(task)](random.Random(seed))
        chosen = _template(template or str(task))
        target = next(name for name in _ANSWERS if name in items[0])
        return Task(str(task), chosen, items[:ITEMS], items[ITEMS:], labels or own, target)
    path = Path(task)
    if not path.exists():
        raise FileNotFoundError(
            f"task {str(task)!r}: no such file; expected a file of records (.jsonl, .csv, .parquet), or one of {', '.join(TASKS)}"
        )
    if template is None:
        raise ValueError(
            f"task {path}: no template; name a shipped one, or a Jinja2 file that makes a prompt of an item"
        )
    found = list(read_objects(path))
    records = [item for _, item in found]
    chosen = _template(template)
    target = _target(path, found, labels)
    needed = set.intersection(*(set(example) for example in chosen.examples)) if chosen.examples else set()
    pool = [item for item in records if needed <= set(item)]
    spare = [item for item in chosen.examples if labels is None or item.get(target) in labels]
    return Task(path.name, chosen, records, pool, labels, target, spare)


def _template(name: str) -> Template:
    path = Path(name)
    return Template(read_text(path), path.name) if path.is_file() else load_template(name)


def _target(path: Path, found: Sequence[tuple[str, Item]], labels: Sequence[str] | None) -> str:
    """The field of the answers, which every item must have. found: the items, each after its place in the file."""
    if not found:
        raise ValueError(f"task {path}: no items; expected an object a line")
    target = next((name for name in _ANSWERS if name in found[0][1]), "")
    for where, item in found:
        if not isinstance(item.get(target), str) or not item[target]:
            raise ValueError(f"{where}: no text in `{target or '`, `'.join(_ANSWERS)}`; every item needs its answer")
        if labels and item[target] not in labels:
            raise ValueError(f"{where}: {target} is {item[target]!r}; expected one of {', '.join(labels)}")
    return target


Made = tuple[list[dict[str, Any]], "Sequence[str] | None"]


def _passages(draw: random.Random, genre: str, count: int) -> list[str]:
    """Passages of whole words."""
    texts = [document.text for document in load_documents(f"shakespeare:{genre}")]
    found = []
    while len(found) < count:
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - 2 * _PASSAGE))
        words = text[start : start + _PASSAGE].split(" ")[1:-1]
        found.append(" ".join(words).strip())
    return found


def _genre(draw: random.Random) -> Made:
    count = (ITEMS + POOL) // len(GENRES)
    items = [{"text": text, "label": genre} for genre in GENRES for text in _passages(draw, genre, count)]
    draw.shuffle(items)
    return items, GENRES


def _cloze(draw: random.Random) -> Made:
    items = []
    for text in _passages(draw, "comedy,history,tragedy", 2 * (ITEMS + POOL)):
        found = re.fullmatch(r"(.*\S)\s+([A-Za-z]{3,})\W*", text, re.S)
        if found:
            items.append({"text": found[1], "label": found[2]})
    return items[: ITEMS + POOL], None


def _words(draw: random.Random, change: Callable[[list[str]], list[str]]) -> Made:
    drawn = [draw.sample(_WORDS, draw.randint(3, 5)) for _ in range(ITEMS + POOL)]
    return [{"text": " ".join(words), "label": " ".join(change(words))} for words in drawn], None


def _addition(draw: random.Random) -> Made:
    pairs = [(draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(ITEMS + POOL)]
    return [{"text": f"{a} + {b}", "label": str(a + b)} for a, b in pairs], None


def _arithmetic(draw: random.Random) -> Made:
    items = []
    for _ in range(ITEMS + POOL):
        who, what, boxes, more = draw.choice(_PEOPLE), draw.choice(_THINGS), draw.randint(2, 9), draw.randint(2, 9)
        has = draw.randint(boxes + 1, 40)
        if draw.random() < 0.5:
            asked = f"{who} has {has} {what}. {who} buys {boxes} boxes of {more} {what} each."
            thought = f"{boxes} boxes of {more} {what} each are {boxes * more} {what}. {has} + {boxes * more} = {has + boxes * more}."
            answer = has + boxes * more
        else:
            asked = f"{who} has {has} {what}. {who} gives {boxes} of them away and finds {more} more."
            thought = f"{has} - {boxes} = {has - boxes} {what} are left. {has - boxes} + {more} = {has - boxes + more}."
            answer = has - boxes + more
        question = f"{asked} How many {what} does {who} have now?"
        items.append({"question": question, "reasoning": thought, "answer": str(answer)})
    return items, None


def _induction(draw: random.Random) -> Made:
    items = []
    for _ in range(ITEMS + POOL):
        words = draw.sample(_WORDS, 12)
        again = draw.randrange(len(words) - 1)
        items.append({"text": " ".join([*words, words[again]]), "label": words[again + 1]})
    return items, None


TASKS: dict[str, Callable[[random.Random], Made]] = {
    "genre": _genre,
    "cloze": _cloze,
    "copying": lambda draw: _words(draw, lambda words: words),
    "reversal": lambda draw: _words(draw, lambda words: words[::-1]),
    "addition": _addition,
    "arithmetic": _arithmetic,
    "induction": _induction,
}
