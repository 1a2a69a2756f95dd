"""A grammar of JSON (RFC 8259) over bytes, which masks the tokens that cannot continue an object.  V vocabulary."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

DEPTH = 20  # of objects and lists
BLANKS = 16  # in a row between two parts: a model that only writes blanks comes to an end
KEPT = 256  # masks, and texts whose state is remembered
NEEDED = b'{}[]":,0truefalsn'  # without a token for each of these a text can come to a place from where nothing goes on

_BLANK, _DIGITS, _HEX = b" \t\n\r", b"0123456789", b"0123456789abcdefABCDEF"
_LITERALS = {word[0]: word[1:] for word in (b"true", b"false", b"null")}  # by their first bytes
# Numbers: mode -> (bytes, next mode); what ends a number is read as what stands behind it.
_NUMBER = {
    "-": ((b"0", "0"), (_DIGITS, "digits")),
    "0": ((b".", "."), (b"eE", "e")),
    "digits": ((_DIGITS, "digits"), (b".", "."), (b"eE", "e")),
    ".": ((_DIGITS, "fraction"),),
    "fraction": ((_DIGITS, "fraction"), (b"eE", "e")),
    "e": ((b"+-", "sign"), (_DIGITS, "exponent")),
    "sign": ((_DIGITS, "exponent"),),
    "exponent": ((_DIGITS, "exponent"),),
}
_WHOLE = ("0", "digits", "fraction", "exponent")  # modes in which a number may end


class State(NamedTuple):
    """A place in a JSON text.

    mode: what comes next: "object" (the first byte), "key", "key or end", "colon", "value", "value or end", "next" (behind a
        value), "done"; a string: "text", "escape", or "\\u" with the number of digits that follow; a mode of `_NUMBER`; or the
        rest of a literal.
    stack: the open objects { and lists [; behind them " within a key.
    blanks: in a row before this place.
    """

    mode: str | bytes
    stack: str = ""
    blanks: int = 0


START, DONE = State("object"), State("done")


def step(state: State, byte: int) -> State | None:
    """The place behind a byte; None where the byte cannot stand there."""
    mode, stack, blanks = state
    if mode == "text":
        if byte == 34:
            return State("colon", stack[:-1]) if stack[-1] == '"' else State("next", stack)
        return State("escape", stack) if byte == 92 else state if byte >= 32 else None
    if isinstance(mode, bytes):
        return (State(mode[1:] or "next", stack)) if byte == mode[0] else None
    if mode in _NUMBER:
        for allowed, after in _NUMBER[mode]:
            if byte in allowed:
                return State(after, stack)
        return step(State("next", stack), byte) if mode in _WHOLE else None
    if mode == "escape":
        if byte == 117:
            return State("\\u4", stack)
        return State("text", stack) if byte in b'"\\/bfnrt' else None
    if mode.startswith("\\u"):
        left = int(mode[2]) - 1
        return (State(f"\\u{left}" if left else "text", stack)) if byte in _HEX else None
    if mode != "done" and byte in _BLANK:
        return State(mode, stack, blanks + 1) if blanks < BLANKS else None
    return _structure(mode, stack, byte)


def _structure(mode: str, stack: str, byte: int) -> State | None:
    """The place behind a byte that is no blank, outside strings, numbers and literals."""
    if mode == "object":
        return State("key or end", "{") if byte == 123 else None
    if mode in ("key", "key or end") and byte == 34:
        return State("text", stack + '"')
    if mode == "colon":
        return State("value", stack) if byte == 58 else None
    closes = mode == "next" or mode.endswith(" or end")
    if closes and stack and byte == (125 if stack[-1] == "{" else 93):
        return State("next", stack[:-1]) if len(stack) > 1 else DONE
    if mode == "next":
        return State("key" if stack[-1] == "{" else "value", stack) if byte == 44 else None
    return _value(stack, byte) if mode.startswith("value") else None


def _value(stack: str, byte: int) -> State | None:
    """The place behind the first byte of a value."""
    if byte == 34:
        return State("text", stack)
    if byte in (123, 91):
        more = State("key or end", stack + "{") if byte == 123 else State("value or end", stack + "[")
        return more if len(stack) < DEPTH else None
    if byte in _LITERALS:
        return State(_LITERALS[byte], stack)
    number = "-" if byte == 45 else "0" if byte == 48 else "digits" if byte in _DIGITS else None
    return number and State(number, stack)


class JsonGrammar:
    """Which tokens of a vocabulary continue a JSON object, and where it is complete.

    Args:
        tokenizer: of `gptfast.tokenizer`. Its special tokens are not used.
        V: ids of the model.
    Raises:
        ValueError: the vocabulary cannot write JSON.
    """

    def __init__(self, tokenizer: Any, V: int) -> None:
        special = set(getattr(getattr(tokenizer, "inner", tokenizer), "specials", {}).values())
        known = [i for i in range(min(V, tokenizer.vocab_size)) if tokenizer.has_token(i) and i not in special]
        self._bytes = {i: text for i in known if (text := tokenizer.decode_bytes([i]))}
        single = {text for text in self._bytes.values() if len(text) == 1}
        lacking = [chr(byte) for byte in NEEDED if bytes([byte]) not in single]
        if lacking:
            raise ValueError(f"this model's vocabulary cannot write JSON: it has no token for {lacking[0]!r}")
        self._V = V
        self._sorted = sorted(self._bytes.items(), key=lambda item: item[1])
        self._shared = [0]  # bytes that each token shares with the one before it
        for (_, a), (_, b) in zip(self._sorted, self._sorted[1:], strict=False):
            shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            self._shared.append(shared)
        self._masks: OrderedDict[State, Tensor] = OrderedDict()
        self._states: OrderedDict[tuple[int, ...], State | None] = OrderedDict()

    def allowed(self, new: Sequence[int]) -> Tensor:
        """(V,) bool: the tokens that may follow the new tokens of a text; none where the object is complete."""
        state = self._state(tuple(new))
        if state is None:
            return torch.zeros(self._V, dtype=torch.bool, device="cpu")
        if state not in self._masks:
            _keep(self._masks, state, self._mask(state))
        return self._masks[state]

    def complete(self, new: Sequence[int]) -> bool:
        """Whether the new tokens are a whole object."""
        return self._state(tuple(new)) == DONE

    def _state(self, new: tuple[int, ...]) -> State | None:
        """The place behind tokens; None where they are no beginning of an object."""
        if not new:
            return START
        if new not in self._states:
            known = next(n for n in range(len(new) - 1, -1, -1) if n == 0 or new[:n] in self._states)
            state = self._states[new[:known]] if known else START
            for token in new[known:]:
                for byte in self._bytes.get(token, b""):
                    state = state and step(state, byte)
            _keep(self._states, new, state)
        return self._states[new]

    def _mask(self, state: State) -> Tensor:
        """Of tokens in alphabetical order: those with a beginning that cannot stand here are passed over together."""
        mask, path, refused = (
            torch.zeros(self._V, dtype=torch.bool, device="cpu"),
            [state],
            0,
        )  # places behind 0, 1, … bytes
        fine: list[int] = []
        for (token, text), shared in zip(self._sorted, self._shared, strict=True):
            if refused and shared >= refused:
                continue
            refused = 0
            del path[shared + 1 :]
            for n in range(shared, len(text)):
                after = step(path[n], text[n])
                if after is None:
                    refused = n + 1
                    break
                path.append(after)
            else:
                fine.append(token)
        mask[fine] = True
        return mask


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    if len(cache) > KEPT:
        cache.popitem(last=False)


_made: WeakKeyDictionary[Any, dict[int, JsonGrammar]] = WeakKeyDictionary()


def json_grammar(tokenizer: Any, V: int) -> JsonGrammar:
    """The grammar for a tokenizer and a vocabulary, made once. Raises ValueError: the vocabulary cannot write JSON."""
    with suppress(TypeError):  # tokenizers that cannot be keys of a dict are not cached
        if V in _made.setdefault(tokenizer, {}):
            return _made[tokenizer][V]
    grammar = JsonGrammar(tokenizer, V)
    with suppress(TypeError):
        _made[tokenizer][V] = grammar
    return grammar
