"""The protocol of tokenizers, checks of text and ids, and decoding token by token."""

from __future__ import annotations

import codecs
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

from gptfast._folders import staged_folder
from gptfast._snapshots import TOKENIZER
from gptfast.tokenizer.added import END_OF_TEXT as END_OF_TEXT

AllowedSpecial = Collection[str] | Literal["all"]


class Tokenizer(Protocol):
    """Text to token ids and back.

    kind: "gpt2", "bpe", "openai-gpt", "hf", "char", "word" or "wordpiece".
    """

    kind: str

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a document; None without one (characters, GPT-1)."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    def has_token(self, token: int) -> bool:
        """Whether an id has a token; ids below `vocab_size` may have none."""
        ...

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        """The ids of `text`.

        Args:
            text: any str without lone surrogates.
            allowed_special: names of special tokens ("<|endoftext|>") that are encoded as their single id, or
                "all". By default they are ordinary text, so that no document or user can inject one.
        Raises:
            ValueError: a lone surrogate, an unknown special token, or a character outside a character
                vocabulary.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id without a token."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may end inside a character."""
        ...

    def files(self) -> dict[str, bytes]:
        """The content of the tokenizer's files by name."""
        ...

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into `folder`, for `load_tokenizer(folder)`."""
        ...

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer whose files are in `folder`."""
        ...


class Lenient:
    """A wrapper of a tokenizer that decodes ids without a token to nothing.

    For generation: a request may force such an id (logit_bias), and that must not abort its text or those of others.
    """

    def __init__(self, inner: Tokenizer) -> None:
        self.inner, self.kind = inner, inner.kind

    @property
    def eos_id(self) -> int | None:
        return self.inner.eos_id

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def has_token(self, token: int) -> bool:
        return self.inner.has_token(token)

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        return self.inner.encode(text, allowed_special)

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(filter(self.inner.has_token, ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.inner.decode_bytes(filter(self.inner.has_token, ids))

    def files(self) -> dict[str, bytes]:
        return self.inner.files()

    def save(self, folder: str | os.PathLike[str]) -> None:
        self.inner.save(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Lenient:
        raise TypeError("Lenient.load: a Lenient has no files; use lenient(load_tokenizer(folder))")


def lenient(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that decodes ids without a token to nothing, and otherwise is `tokenizer`."""
    return tokenizer if isinstance(tokenizer, Lenient) or not hasattr(tokenizer, "has_token") else Lenient(tokenizer)


def save_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Replace a folder's tokenizer by files, all or none."""
    with staged_folder(folder, replaces=TOKENIZER) as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content)


class StreamDecoder:
    """Decodes one sequence token by token; the results of `push` and `finish` join to `tokenizer.decode(ids)`.

    A character whose bytes belong to several tokens is returned with the last of them. A trailing space is returned with
    the next token: GPT-1 has one after each word, and its `decode` drops the last.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decode_next = getattr(getattr(tokenizer, "inner", tokenizer), "decode_next", None)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._spaces = ""
        self._length = 0  # characters returned so far

    def push(self, token: int) -> str:
        """The text that `token` completes; "" where more bytes are needed."""
        if self._decode_next is not None and self.tokenizer.has_token(token):
            text = self._spaces + self._decode_next(token, not self._length)
        else:
            text = self._spaces + self._utf8.decode(self.tokenizer.decode_bytes([token]))
        shown = text.rstrip(" ")
        self._spaces = text[len(shown) :]
        self._ids.append(token)
        self._length += len(shown)
        return shown

    def finish(self) -> str:
        """The remaining text, with U+FFFD for a character that is not complete."""
        rest = self.tokenizer.decode(self._ids)[self._length :]
        self._length += len(rest)
        return rest


def check_text(owner: str, text: str) -> None:
    """Raise unless `text` is a str that UTF-8 can hold.

    Raises:
        TypeError: not a str.
        ValueError: a lone surrogate, half of a pair that UTF-16 uses; it has no UTF-8 form, so it cannot
            round-trip.
    """
    if not isinstance(text, str):
        raise TypeError(f"{owner}.encode: text is {type(text).__name__}; expected str (decode bytes first)")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{owner}.encode: text has a lone surrogate U+{ord(text[error.start]):04X} at position "
            f"{error.start}, which is no character; repair the text with "
            'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
        ) from None


def choose_special(owner: str, allowed: AllowedSpecial, specials: Collection[str]) -> set[str]:
    """The special tokens that `allowed_special` names. Raises ValueError for one that the vocabulary lacks."""
    if allowed == "all":
        return set(specials)
    if isinstance(allowed, str):
        raise TypeError(f"{owner}.encode: allowed_special is {allowed!r}; expected a collection of names or 'all'")
    unknown = sorted(set(allowed) - set(specials))
    if unknown:
        raise ValueError(
            f"{owner}.encode: allowed_special names {unknown[0]!r}; this tokenizer has "
            f"{', '.join(map(repr, sorted(specials))) or 'no special tokens'} - leave it out or pass 'all'"
        )
    return set(allowed)


def encode_prompt(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """The ids of a prompt; the one rule for prompts everywhere in gptfast.

    Args:
        special: encode special tokens in the text as their ids, as vLLM and llama.cpp do. False: as ordinary text, for
            prompts of untrusted users.
    """
    return tokenizer.encode(text, allowed_special="all" if special else ())


def encode_part(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that others stand before or behind: special tokens as ordinary text, and without the tokens that some
    tokenizers (Llama's) put before or behind every text."""
    plain = getattr(getattr(tokenizer, "inner", tokenizer), "encode_plain", None)
    return tokenizer.encode(text) if plain is None else plain(text)


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before every text; most put none."""
    whole, part = tokenizer.encode("1"), encode_part(tokenizer, "1")
    starts = (n for n in range(len(whole)) if part and whole[n : n + len(part)] == part)
    return whole[: next(starts, 0)]


def token_text(tokenizer: Tokenizer, token: int) -> str | bytes:
    """The text of a token; its bytes, if they are not whole characters of UTF-8."""
    content = tokenizer.decode_bytes([token])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content


def unknown_id(owner: str, token: object, vocab_size: int) -> ValueError:
    """The error for an id that has no token."""
    return ValueError(
        f"{owner}.decode: id {token} has no token; ids run from 0 to {vocab_size - 1} - "
        "does the model belong to this tokenizer (a vocabulary padded for speed has ids without a token)?"
    )


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turns the errors of `tokenizers` into ValueError; it raises bare Exceptions, and BaseExceptions for panics.

    Args:
        message: the text of the ValueError, with {error} in it.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(message.format(error=error)) from error
