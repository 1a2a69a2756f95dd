"""WordPiece, the tokenizer of BERT: words, and pieces that continue a word; the `tokenizers` library encodes and trains."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from gptfast._files import read_text
from gptfast._json import NULL, field, read_json
from gptfast._snapshots import current, read_whole
from gptfast.tokenizer.added import CONFIG, gather, named_token, read_settings
from gptfast.tokenizer.base import AllowedSpecial, check_text, choose_special, unknown_id
from gptfast.tokenizer.hf import HFTokenizer
from gptfast.tokenizer.hf_files import HFFiles
from gptfast.tokenizer.pieces import LINES
from gptfast.tokenizer.vocabulary import as_texts

VOCAB = "vocab.txt"
PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIALS = (PAD, UNK, CLS, SEP, MASK)
_ROLES = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
_PREFIX = "##"


class WordPieceTokenizer(HFTokenizer):
    """BERT's tokenizer: `encode` gives the pieces of a text alone, without [CLS] and [SEP] around them.

    The end of a document is [SEP]. Text is cleaned, and lower-cased where the files say so, so that it cannot be restored to the
    letter.

    Args:
        files: the content of a folder, see `read_wordpiece`.
    Raises:
        ValueError: files that the `tokenizers` library refuses.
    """

    kind = "wordpiece"
    whole_texts = False
    cuts = LINES

    def __init__(self, files: HFFiles) -> None:
        super().__init__(files)
        self.roles = {name: named_token(files.settings, name, Path()) or usual for name, usual in _ROLES.items()}
        self.eos_id = self.vocab.get(self.roles["sep_token"])
        self._prefix = str(files.spec["model"].get("continuing_subword_prefix") or _PREFIX)

    def special_id(self, role: str) -> int | None:
        """The id of "mask_token", "cls_token", "sep_token", "pad_token" or "unk_token"; None: the vocabulary has none."""
        return self.vocab.get(self.roles[role])

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        check_text("WordPieceTokenizer", text)
        allowed = choose_special("WordPieceTokenizer", allowed_special, self.specials)
        return self._encoder(frozenset(allowed)).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        for i in ids:
            self._bytes(i)  # an id without a token is an error
        return self._encoder(frozenset(self.specials)).decode(ids, skip_special_tokens=False)

    def decode_next(self, token: int, first: bool) -> str:
        """What a token adds to the text of those before it: a blank and its own, but for pieces of a word, marks that stand
        behind a word, and the first of all."""
        text = self.decode([token])
        return text if first else self.decode([token, token])[len(text) :]

    def _bytes(self, i: int) -> bytes:
        token = self._tokens.get(i)
        if token is None:
            raise unknown_id("WordPieceTokenizer", i, self.vocab_size)
        return (token.removeprefix(self._prefix) if token.startswith(self._prefix) else " " + token).encode()

    def continues(self, token: int) -> bool:
        """Whether a token is a piece inside a word, such as ##ing."""
        return self._tokens.get(token, "").startswith(self._prefix)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, vocab.txt and tokenizer_config.json for transformers' BertTokenizer."""
        spec, settings = self.hf_files.spec, self.hf_files.settings
        kept = {name: value for name, value in settings.items() if name not in ("added_tokens_decoder", "backend")}
        config: dict[str, Any] = {**kept, **self.roles, "tokenizer_class": "BertTokenizer"}
        normal = spec.get("normalizer") or {}
        if normal.get("type") == "BertNormalizer":
            config |= {"do_lower_case": normal["lowercase"], "strip_accents": normal.get("strip_accents")}
            config |= {"tokenize_chinese_chars": normal.get("handle_chinese_chars", True)}
        else:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        made = {
            "tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(),
            CONFIG: json.dumps(config, indent=2).encode(),
        }
        tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        if [self.vocab[token] for token in tokens] == list(range(len(tokens))):
            made[VOCAB] = "".join(f"{token}\n" for token in tokens).encode()
        return made

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> WordPieceTokenizer:
        return cls(read_wordpiece(folder))

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int, lowercase: bool = True) -> WordPieceTokenizer:
        """Learn pieces: repeatedly join the most frequent pair of adjacent pieces inside words, until there are enough.

        Args:
            texts: one text, several, or pieces of one.
            vocab_size: number of tokens, more than the five special ones; a small text gives fewer.
            lowercase: encode text in lower case and without accents, as BERT's uncased models.
        Raises:
            ValueError: vocab_size too small, or a text with a lone surrogate.
        """
        if vocab_size <= len(SPECIALS):
            raise ValueError(
                f"WordPieceTokenizer.train: vocab_size is {vocab_size}; expected more than the {len(SPECIALS)} special tokens - "
                "try 1024 for a tiny text, 8192 for a book"
            )
        rust = RustTokenizer(models.WordPiece(unk_token=UNK))
        rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        parts = [_checked(text) for text in as_texts(texts)]
        # the trainer numbers the pieces of one character in the order of a hash table, and ties go by number: give them theirs
        first = [*SPECIALS, *_single_pieces(rust, parts)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, min_frequency=2, special_tokens=first, show_progress=False
        )
        rust.train_from_iterator(parts, trainer)
        return cls(
            _files({token: i for i, token in enumerate(_ordered(rust.get_vocab()))}, {"do_lower_case": lowercase})
        )


def _checked(text: str) -> str:
    check_text("WordPieceTokenizer", text)
    return text


def _single_pieces(rust: Any, parts: list[str]) -> list[str]:
    """The characters that can continue a word, as pieces: no blanks, and none that are words by themselves, as commas."""
    characters = {c for text in parts for c in rust.normalizer.normalize_str(text)}
    return [_PREFIX + c for c in sorted(characters) if len(rust.pre_tokenizer.pre_tokenize_str(f"a{c}b")) == 1]


def _ordered(vocab: Mapping[str, int]) -> list[str]:
    """Tokens in an order that no hash table decides: special ones, characters, and pieces as they were learnt."""
    single = sorted(t for t in vocab if len(t.removeprefix(_PREFIX)) == 1 and t not in SPECIALS)
    known = {*SPECIALS, *single}
    return [*SPECIALS, *single, *sorted((t for t in vocab if t not in known), key=vocab.__getitem__)]


def is_wordpiece(folder: Path) -> bool:
    """Whether the tokenizer of a folder is a WordPiece: a tokenizer.json that says so, or a vocab.txt without one."""
    fast = current(folder, "tokenizer.json")
    if not fast.exists():
        return current(folder, VOCAB).exists() and not current(folder, "vocab.json").exists()
    found = read_json(fast)
    model = found.get("model") if isinstance(found, dict) else None
    return isinstance(model, dict) and model.get("type") == "WordPiece"


def read_wordpiece(folder: str | os.PathLike[str]) -> HFFiles:
    """Read tokenizer.json, or vocab.txt and the settings beside it.

    Raises:
        FileNotFoundError: neither is there.  ValueError: a damaged file, or one of another kind.
    """
    return read_whole(folder, lambda: _read(Path(folder)))


def _read(folder: Path) -> HFFiles:
    settings, fast = read_settings(folder), current(folder, "tokenizer.json")
    if not fast.exists():
        return _files(_read_vocab(current(folder, VOCAB)), settings)
    spec = read_json(fast)
    model = field(spec, "model", dict, fast)
    if model.get("type") != "WordPiece":
        raise ValueError(
            f"{fast}: model.type is {model.get('type')!r}; expected 'WordPiece' - use load_tokenizer(folder)"
        )
    vocab = field(model, "vocab", dict, fast, inside="model")
    for token, i in vocab.items():
        if type(i) is not int or i < 0:
            raise ValueError(f"{fast}: the id of {token!r} is {i!r}; expected a number from 0 on - the file is damaged")
    given = field(spec, "added_tokens", (list, NULL), fast, None) or []
    return _complete(spec, vocab, given, settings, folder)


def _read_vocab(path: Path) -> dict[str, int]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected it, or a tokenizer.json, beside the checkpoint")
    tokens = read_text(path).split("\n")
    tokens = tokens[:-1] if tokens and not tokens[-1] else tokens
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"{path}: the token {twice!r} stands on two lines; the file is damaged")
    if UNK not in vocab:
        raise ValueError(f"{path} has no {UNK}; expected one token a line, as BERT's - it is cut short or another file")
    return vocab


def _files(vocab: dict[str, int], settings: dict[str, Any]) -> HFFiles:
    """What transformers' BertTokenizer makes of a vocab.txt and settings."""
    chinese = settings.get("tokenize_chinese_chars", True)
    normal = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": chinese}
    lower, accents = settings.get("do_lower_case", True), settings.get("strip_accents")
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {**normal, "strip_accents": accents, "lowercase": lower},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _template(vocab, settings),
        "decoder": {"type": "WordPiece", "prefix": _PREFIX, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": UNK,
            "continuing_subword_prefix": _PREFIX,
            "max_input_chars_per_word": 100,
        },
    }
    return _complete(spec, vocab, [], settings, Path())


def _complete(
    spec: dict[str, Any], vocab: dict[str, int], given: list[Any], settings: dict[str, Any], folder: Path
) -> HFFiles:
    named = {**{name: token for name, token in _ROLES.items() if token in vocab}, **settings}
    spec = {**spec, "added_tokens": gather(folder, named, vocab, given)}
    spec["model"] = {**spec["model"], "vocab": vocab}
    return HFFiles(vocab, [], named_token(named, "sep_token", folder), spec, settings)


def _template(vocab: dict[str, int], settings: dict[str, Any]) -> dict[str, Any] | None:
    """[CLS] A [SEP] B [SEP], for other readers of the file."""
    first, last = (named_token(settings, name, Path()) or _ROLES[name] for name in ("cls_token", "sep_token"))
    if first not in vocab or last not in vocab:
        return None

    def special(token: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    single = [special(first, 0), {"Sequence": {"id": "A", "type_id": 0}}, special(last, 0)]
    names = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in (first, last)}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, special(last, 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": names}
