"""Tokenizers that are a plain list of tokens: characters, and words."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptfast._json import naming
from gptfast._snapshots import current
from gptfast.tokenizer.base import END_OF_TEXT, AllowedSpecial, check_text, choose_special, save_files, unknown_id
from gptfast.tokenizer.list_files import FILE_NAME, list_content, read_list
from gptfast.tokenizer.pieces import WORDS
from gptfast.tokenizer.word_pattern import split_pattern

if TYPE_CHECKING:
    from typing_extensions import Self

UNKNOWN = "<|unk|>"
_NONE = 2**32 - 1  # no id
# A word, number or punctuation mark with the one space before it, or a single whitespace character. The
# pieces join to the text. Words keep inner apostrophes ("o'er", "don't").
_PIECES = re.compile(r" ?\w+(?:['\u2019]\w+)*| ?[^\w\s]|\s")


class _ListTokenizer:
    """A tokenizer whose `tokens[id]` is the text of each id."""

    kind = ""
    cuts = WORDS  # where a text can be divided: see `gptfast.tokenizer.pieces`
    eos_id: int | None = None

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if not self.tokens or len(self._ids) < len(self.tokens):
            repeated = [token for token, n in Counter(self.tokens).items() if n > 1]
            got = f"repeats {repeated[0]!r}" if repeated else "is empty"
            raise ValueError(f"{type(self).__name__}: the list of tokens {got}; expected distinct tokens")

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def has_token(self, token: int) -> bool:
        return 0 <= token < len(self.tokens)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._token(int(i)) for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8")

    def _token(self, i: int) -> str:
        if not 0 <= i < len(self.tokens):
            raise unknown_id(type(self).__name__, i, len(self.tokens))
        return self.tokens[i]

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json for the `tokenizers` library and transformers."""
        return list_content(self.kind, self._ids, self._split_pattern(), self._specials())

    def save(self, folder: str | os.PathLike[str]) -> None:
        save_files(folder, self.files())

    def _split_pattern(self) -> str:
        raise NotImplementedError

    def _specials(self) -> dict[str, str]:
        """The special tokens by their names in tokenizer_config.json."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        tokens = read_list(folder, cls.kind)
        with naming(current(folder, FILE_NAME)):
            return cls(tokens)


class CharTokenizer(_ListTokenizer):
    """One token for each character that occurs in a text; the ids follow the order of Unicode.

    A character that does not occur raises an error, or becomes <|unk|> where `tokens` has that.
    """

    kind = "char"

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        self.unk_id = self._ids.get(UNKNOWN)
        self._table: np.ndarray | None = None  # id by code point

    @classmethod
    def train(cls, texts: str | Iterable[str], unk: bool = False) -> CharTokenizer:
        """The tokenizer of all characters in `texts`, with <|unk|> for all others if `unk`.

        Raises:
            ValueError: there is no character.
        """
        found: set[str] = set()
        for text in as_texts(texts):
            check_text(cls.__name__, text)
            found.update(text)
        return cls([*sorted(found), *([UNKNOWN] if unk and found else [])])

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        check_text("CharTokenizer", text)
        specials = () if self.unk_id is None else (UNKNOWN,)
        if choose_special("CharTokenizer", allowed_special, specials) and UNKNOWN in text:
            first, *others = (self.encode(part) for part in text.split(UNKNOWN))
            return [*first, *(i for part in others for i in (self._ids[UNKNOWN], *part))]
        if self.unk_id is not None:
            return [self._ids.get(character, self.unk_id) for character in text]
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError as error:
            c = error.args[0]
            raise ValueError(
                f"CharTokenizer.encode: text has {c!r} (U+{ord(c):04X}) at position {text.index(c)}, which "
                f"is not among the {len(self.tokens)} characters of the training text; remove it, or train with "
                "--tokenizer bpe (or gpt2), which encodes any text, or with --unk (get_tokenizer('char', text, unk=True)), which "
                "encodes it as <|unk|>"
            ) from None

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text` as an array of uint32, which is faster than a list; "<|unk|>" is ordinary text."""
        check_text("CharTokenizer", text)
        if self._table is None:
            self._table = np.full(0x110000, _NONE if self.unk_id is None else self.unk_id, np.uint32)
            self._table[[ord(token) for token in self.tokens if len(token) == 1]] = [
                i for i, token in enumerate(self.tokens) if len(token) == 1
            ]
        ids = self._table[np.frombuffer(text.encode("utf-32-le"), "<u4")]
        if self.unk_id is None and (ids == _NONE).any():
            self.encode(text)  # raises ValueError
        return ids

    def _split_pattern(self) -> str:
        return r"[\s\S]"

    def _specials(self) -> dict[str, str]:
        return {} if self.unk_id is None else {"unk_token": UNKNOWN}


class WordTokenizer(_ListTokenizer):
    """Words, punctuation marks and whitespace, most frequent first, then <|endoftext|> and <|unk|>.

    A token includes the one space before it, as in GPT-2, so decoding only joins tokens. A word that is not in the
    vocabulary becomes <|unk|>.
    """

    kind = "word"

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        for name in (END_OF_TEXT, UNKNOWN):
            if name not in self._ids:
                raise ValueError(f"WordTokenizer: the list of tokens has no {name!r}; add it at the end")
        self.eos_id = self._ids[END_OF_TEXT]
        self.unk_id = self._ids[UNKNOWN]
        self._pattern = ""  # made by the first save

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int | None = None) -> WordTokenizer:
        """The tokenizer of the words in `texts`.

        Args:
            texts: one text or several.
            vocab_size: largest number of tokens, >= 3; the most frequent words are kept. None: all words.
        """
        if vocab_size is not None and vocab_size < 3:
            raise ValueError(
                f"WordTokenizer.train: vocab_size is {vocab_size}; expected at least 3, for {END_OF_TEXT}, "
                f"{UNKNOWN} and a word"
            )
        counts: Counter[str] = Counter()
        for text in as_texts(texts):
            check_text(cls.__name__, text)
            counts.update(_PIECES.findall(text))
        if not counts:
            raise ValueError("WordTokenizer.train: texts have no words; pass text with words")
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([*words[: vocab_size and vocab_size - 2], END_OF_TEXT, UNKNOWN])

    def _split_pattern(self) -> str:
        self._pattern = self._pattern or split_pattern(self.tokens)
        return self._pattern

    def _specials(self) -> dict[str, str]:
        return {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": UNKNOWN}

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        check_text("WordTokenizer", text)
        allowed = choose_special("WordTokenizer", allowed_special, (END_OF_TEXT, UNKNOWN))
        parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text) if allowed else [text]
        return [i for part in parts for i in self._part(part, part in allowed)]

    def _part(self, part: str, special: bool) -> Iterator[int]:
        if special:
            yield self._ids[part]
            return
        for piece in _PIECES.findall(part):
            if piece not in self._ids and piece[0] == " " and " " in self._ids:
                yield self._ids[" "]  # the vocabulary may have the word without its space
                piece = piece[1:]
            yield self._ids.get(piece, self.unk_id)


def as_texts(texts: str | Iterable[str]) -> Iterable[str]:
    """A list of texts; a single text becomes a list of one."""
    return [texts] if isinstance(texts, str) else texts
