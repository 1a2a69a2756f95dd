"""Tokenizers that are a plain list of tokens: characters, and words."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from gptfast._folders import staged_folder
from gptfast._json import NULL, expect, field, items, naming, read_json
from gptfast._snapshots import TOKENIZER, current
from gptfast.tokenizer.added import CONFIG
from gptfast.tokenizer.base import END_OF_TEXT, AllowedSpecial, check_text, choose_special, unknown_id

if TYPE_CHECKING:
    from typing_extensions import Self

UNKNOWN = "<|unk|>"
FILE_NAME = "tokenizer.json"
KIND = "gptfast_kind"  # in tokenizer_config.json
# A word, number or punctuation mark with the one space before it, or a single whitespace character: the
# pieces join to the text again. Words keep inner apostrophes ("o'er", "don't").
_PIECES = re.compile(r" ?\w+(?:['\u2019]\w+)*| ?[^\w\s]|\s")


class _ListTokenizer:
    """tokens[id] is the text of token id."""

    kind = ""
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

    def save(self, folder: str | os.PathLike[str]) -> None:
        text = json.dumps({"kind": self.kind, "version": 1, "tokens": self.tokens}, ensure_ascii=False)
        with staged_folder(folder, replaces=TOKENIZER) as stage:
            (stage / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        path = current(folder, FILE_NAME)
        found = read_json(path)
        kind = kind_of(folder)
        if kind != cls.kind:
            raise ValueError(f"{path}: kind is {kind!r}; expected {cls.kind!r} - use load_tokenizer(folder)")
        version = field(found, "version", int, path)
        if version != 1:
            raise ValueError(f"{path}: version is {version}; expected 1 - update gptfast")
        tokens = items(field(found, "tokens", list, path), str, "tokens", path)
        with naming(path):
            return cls(tokens)


class CharTokenizer(_ListTokenizer):
    """One token for each character that occurs in a text; the ids follow the order of Unicode.

    A character that does not occur is an error, or becomes <|unk|> where `tokens` holds that.
    """

    kind = "char"

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        self.unk_id = self._ids.get(UNKNOWN)

    @classmethod
    def train(cls, texts: str | Iterable[str], unk: bool = False) -> CharTokenizer:
        """The vocabulary of all characters in `texts`, and <|unk|> for all others if `unk`. Raises ValueError where there is
        none."""
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
                f"is not among the {len(self.tokens)} characters of the training text; remove it, or train "
                "with the tokenizer 'gpt2' or 'bpe', which take any text, or get_tokenizer('char', text, unk=True), which "
                "takes it for <|unk|>"
            ) from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, as the `tokenizers` library and transformers read them."""
        special = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
        added = [] if self.unk_id is None else [{"id": self.unk_id, "content": UNKNOWN, **special}]
        spec = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": UNKNOWN},
        }
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            KIND: self.kind,
        }
        config |= {} if self.unk_id is None else {"unk_token": UNKNOWN}
        with staged_folder(folder, replaces=TOKENIZER) as stage:
            (stage / FILE_NAME).write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
            (stage / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        path = current(folder, FILE_NAME)
        found = read_json(path)
        if kind_of(folder) != cls.kind or not isinstance(found, dict) or "model" not in found:
            return super().load(folder)  # as gptfast wrote it before
        vocab = field(field(found, "model", dict, path), "vocab", dict, path, inside="model")
        tokens = sorted(vocab, key=lambda token: expect(vocab[token], int, f"model.vocab[{token!r}]", path))
        if [vocab[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError(f"{path}: the ids of model.vocab are not 0 to {len(tokens) - 1}; the file is damaged")
        with naming(path):
            return cls(tokens)


def kind_of(folder: str | os.PathLike[str]) -> str | None:
    """The kind of list in a folder: "char" or "word"; None for a tokenizer that gptfast did not write.

    Raises:
        ValueError: a kind that this gptfast does not know.
    """
    for name, key in ((FILE_NAME, "kind"), (CONFIG, KIND)):
        path = current(folder, name)
        kind = field(read_json(path), key, (str, NULL), path, default=None) if path.exists() else None
        if kind not in (None, "char", "word"):
            raise ValueError(f"{path}: kind is {kind!r}; expected 'char' or 'word' - update gptfast, or write it again")
        if kind is not None:
            return kind
    return None


class WordTokenizer(_ListTokenizer):
    """Words, punctuation marks and whitespace, most frequent first, then <|endoftext|> and <|unk|>.

    A token carries the one space before it, as in GPT-2, so decoding joins tokens and loses nothing but what
    is not in the vocabulary: that becomes <|unk|>.
    """

    kind = "word"

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        for name in (END_OF_TEXT, UNKNOWN):
            if name not in self._ids:
                raise ValueError(f"WordTokenizer: the list of tokens has no {name!r}; add it at the end")
        self.eos_id = self._ids[END_OF_TEXT]
        self.unk_id = self._ids[UNKNOWN]

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int | None = None) -> WordTokenizer:
        """The vocabulary of the words in `texts`.

        Args:
            texts: one text or several.
            vocab_size: keep only the most frequent words, so that there are at most this many tokens (>= 3).
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
            raise ValueError("WordTokenizer.train: texts hold no word; give it text to learn words from")
        words = sorted(counts, key=lambda word: (-counts[word], word))
        return cls([*words[: vocab_size and vocab_size - 2], END_OF_TEXT, UNKNOWN])

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
                yield self._ids[" "]  # the word may be known without its space; if not, the space is kept
                piece = piece[1:]
            yield self._ids.get(piece, self.unk_id)


def as_texts(texts: str | Iterable[str]) -> Iterable[str]:
    """A single text as a list of one."""
    return [texts] if isinstance(texts, str) else texts
