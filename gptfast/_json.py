"""JSON from other programs: parsed, its values checked for the types that are expected."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptfast._files import read_text

NULL = type(None)
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NULL: "null",
}
_REQUIRED = object()
DEEPEST = 100  # objects and lists in each other: copying settings recurses
LARGE = 1 << 20  # characters: vocabularies, whose values are looked at one by one anyway
_SURROGATES = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        OSError, ValueError: as `read_text`, or the text is not JSON (line and column are named).
    """
    return parse(read_text(path), path)


def parse(text: str, where: object, unique: bool = False) -> Any:
    """The value of a JSON text. where: its place, for messages. unique: an object that has a key twice is refused.

    Raises:
        ValueError: it is no JSON, or beyond what Python reads (depth, digits, half a surrogate pair).
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # thousands of digits, a key twice
        problem = str(error)
    else:
        return check_value(value, text, where)
    raise ValueError(f"{where} is not valid JSON ({problem}); it is damaged or cut short - write it again")


def check_value(value: Any, text: str, where: object) -> Any:
    """The value of a JSON text. Raises ValueError: it is nested too deeply, or has half a surrogate pair."""
    if len(text) < LARGE and _depth(value) > DEEPEST:
        raise ValueError(f"{where} is nested more than {DEEPEST} levels deep; it is damaged - write it again")
    return _checked(value, where) if _SURROGATES.search(text) else value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError: it has a key twice, of which one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _depth(value: Any) -> int:
    """How many objects and lists lie in each other; looked for no further than is right."""
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level and depth <= DEEPEST:
        depth += 1
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for children in inner for child in children if isinstance(child, (dict, list))]
    return depth


def _checked(value: Any, where: object) -> Any:
    """JSON can write halves of a character, which no file, no terminal and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where} holds {half!r}, half of a surrogate pair; it is damaged - write it again") from None
    return value


def expect(value: Any, kinds: type | tuple[type, ...], what: str, where: object) -> Any:
    """Return `value`, which must be of one of the kinds.

    Args:
        value: from JSON.
        kinds: dict, list, str, int (no bool), float (an int too), bool, NULL.
        what: its key, such as "added_tokens[3].id"; "": the whole value.
        where: the file.
    Raises:
        ValueError: it is not; the text names file, key, what was found and what is expected.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if any(_is(value, kind) for kind in kinds):
        return value
    expected = " or ".join(_NAMES[kind] for kind in kinds)
    raise ValueError(f"{where}: {what or 'the content'} is {short(value)}; expected {expected} - the file is damaged")


def field(
    found: Any, key: str, kinds: type | tuple[type, ...], where: object, default: Any = _REQUIRED, inside: str = ""
) -> Any:
    """The value of a key of a JSON object.

    Args:
        found: the object; that it is one is checked too.
        key, kinds, where: as `expect`.
        default: where the key is missing; without it that is an error.
        inside: the name of the object, for messages.
    Raises:
        ValueError: it is missing, or of another kind.
    """
    what = f"{inside}.{key}" if inside else key
    expect(found, dict, inside, where)
    if key not in found:
        if default is not _REQUIRED:
            return default
        raise ValueError(f"{where}: {what} is missing - the file is damaged, or of another kind")
    return expect(found[key], kinds, what, where)


def items(found: list[Any], kinds: type | tuple[type, ...], what: str, where: object) -> list[Any]:
    """The values of a list, each of one of the kinds."""
    for n, value in enumerate(found):
        if not isinstance(value, kinds) or isinstance(value, bool):  # else no need of its name
            expect(value, kinds, f"{what}[{n}]", where)
    return found


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Begin the messages of ValueErrors raised inside with the file or folder that was read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON. Infinity and nan, for which JSON has no words, are null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: Any) -> str:
    """A value as JSON, cut after a few dozen characters; of a list or an object its kind and length."""
    if isinstance(value, (dict, list)):
        return f"{_NAMES[type(value)]} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) < 50 else f"{text[:40]}…"


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
