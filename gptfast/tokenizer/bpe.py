"""Byte-level BPE: GPT-2's own vocabulary, one trained on the user's text, or one from a checkpoint folder.

A vocabulary has the form of GPT-2's files: `vocab` maps a token to its id, and `merges` lists the pairs in the
order in which they were learnt. Both use GPT-2's printable alphabet for bytes ("Ġ" for a space). `tiktoken`
encodes; `tokenizers` trains.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import chain, repeat
from json import loads
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from gptfast._files import read_asset
from gptfast._json import naming
from gptfast.tokenizer.added import FLAGS
from gptfast.tokenizer.base import END_OF_TEXT, AllowedSpecial, check_text, choose_special, save_files, unknown_id
from gptfast.tokenizer.hf_files import HFFiles, Merge, byte_alphabet, hf_content, parse_merges, read_hf_files
from gptfast.tokenizer.pieces import GPT2, blocks_of, pieces
from gptfast.tokenizer.vocabulary import as_texts

# The pattern of GPT-2 (https://github.com/openai/gpt-2, src/encoder.py), written with tiktoken's possessive
# quantifiers.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"  # SHA-256
_LONG = 1 << 19  # characters: longer texts are encoded in pieces
_PIECE = 1 << 10  # characters of a training text that the trainer splits at once
_LONGEST = 4 * _PIECE  # characters; longer runs of letters or blanks are divided, as the cost of merging is quadratic

_CHARACTER = byte_alphabet()
_BYTE = {character: byte for byte, character in _CHARACTER.items()}


class BPETokenizer:
    """Byte-level byte-pair encoding, which encodes any text and decodes to exactly that text.

    Args:
        vocab: token -> id, with all 256 bytes and every merged token. All other tokens are special tokens.
        merges: pairs of tokens, in the order in which they were learnt.
        eos_token: the special token that ends a document; `eos_id` is None where `vocab` lacks it.
        settings: the content of a tokenizer_config.json, which `save` writes back; None: none.
    Raises:
        ValueError: vocab lacks a byte or a merged token, or gives two tokens one id.
    """

    kind = "bpe"
    cuts = GPT2  # where a text can be divided: see `gptfast.tokenizer.pieces`

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[Merge],
        eos_token: str | None = END_OF_TEXT,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.vocab, self.merges, self.settings = dict(vocab), list(merges), dict(settings or {})
        ranks = _ranks(self.merges)
        tokens = [_write(token) for token in ranks]
        _check_vocab(self.vocab, tokens)
        merged = set(tokens)
        self.specials = {token: i for token, i in self.vocab.items() if token not in merged}
        self.eos_id = self.specials.get(eos_token) if eos_token else None
        # tiktoken uses the rank of a merge as its id, as GPT-2 does; other vocabularies need two tables.
        ids = [self.vocab[token] for token in chain(tokens, self.specials)]
        self._ranks = {i: rank for rank, i in enumerate(ids)}
        self._ids = None if ids == list(range(len(ids))) else np.array(ids, np.uint32)  # by rank
        self._encoding = tiktoken.Encoding(
            "gptfast",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={token: len(ranks) + n for n, token in enumerate(self.specials)},
        )

    @property
    def vocab_size(self) -> int:
        return max(self.vocab.values()) + 1

    def has_token(self, token: int) -> bool:
        return token in self._ranks

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        check_text("BPETokenizer", text)
        allowed = choose_special("BPETokenizer", allowed_special, self.specials)
        if len(text) <= _LONG:
            return self._encode(text, allowed).tolist()
        parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text) if allowed else [text]
        return [i for part in parts for piece in self._pieces(part) for i in self._encode(piece, allowed).tolist()]

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text` as an array of uint32, which is faster than a list; special tokens are ordinary text."""
        check_text("BPETokenizer", text)
        if len(text) <= _LONG:
            return self._encode(text, set())
        return np.concatenate([self._encode(piece, set()) for piece in self._pieces(text)])

    def _pieces(self, text: str) -> Iterable[str]:
        """Pieces of a long text: tiktoken's pattern backtracks over a run of blanks, and fails at a million of them."""
        return [text] if text in self.specials else pieces(blocks_of(text), self.cuts)

    def _encode(self, text: str, allowed: set[str]) -> np.ndarray:
        ranks = self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        return ranks if self._ids is None else self._ids[ranks]

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return self._encoding.decode_bytes([self._ranks[int(i)] for i in ids])
        except KeyError as error:
            raise unknown_id("BPETokenizer", error.args[0], self.vocab_size) from None

    def files(self) -> dict[str, bytes]:
        """vocab.json, merges.txt and tokenizer_config.json for transformers' GPT2Tokenizer."""
        eos = next((token for token, i in self.specials.items() if i == self.eos_id), None)
        special = {name: eos for name in ("bos_token", "eos_token", "unk_token") if eos is not None}
        config = {**special, **self.settings, "tokenizer_class": "GPT2Tokenizer"}
        if self.settings or list(self.specials) != [eos]:
            config["added_tokens_decoder"] = {
                str(i): {"content": t, "special": True, **dict.fromkeys(FLAGS, False)} for t, i in self.specials.items()
            }
        return hf_content(self.vocab, self.merges, config)

    def save(self, folder: str | os.PathLike[str]) -> None:
        save_files(folder, self.files())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> BPETokenizer:
        """The tokenizer of a checkpoint folder: vocab.json + merges.txt, or transformers' tokenizer.json."""
        found = read_hf_files(folder)
        if not found.byte_level:
            raise ValueError(
                f"BPETokenizer.load: {folder} holds the vocabulary of GPT-1 (words that end in </w>); "
                "use load_tokenizer(folder)"
            )
        with naming(folder):
            if not found.plain:
                raise ValueError(
                    "BPETokenizer.load: the files have added tokens or settings (such as add_prefix_space) beyond GPT-2's; use "
                    "load_tokenizer(folder)"
                )
            return BPETokenizer.of_files(found)

    @classmethod
    def of_files(cls, files: HFFiles) -> BPETokenizer:
        """The tokenizer of files of GPT-2's kind, already read."""
        found = BPETokenizer(files.vocab, files.merges, files.eos_token or END_OF_TEXT, files.settings)
        if found._is_gpt2():
            found.kind = "gpt2"
        return found

    def _is_gpt2(self) -> bool:
        """Whether it is the published tokenizer, as prepared data and checkpoints contain it."""
        if self._ids is not None or list(self.specials) != [END_OF_TEXT]:
            return False
        return sha256("\n".join(map(" ".join, self.merges)).encode()).hexdigest() == _GPT2_MERGES

    @classmethod
    def from_merges(cls, merges: Sequence[Merge]) -> BPETokenizer:
        """The tokenizer with GPT-2's order of ids: 256 bytes, the merged tokens, <|endoftext|>."""
        return BPETokenizer(_usual_vocab(merges), merges)

    @classmethod
    def train(cls, texts: str | Iterable[str] | Mapping[str, int], vocab_size: int) -> BPETokenizer:
        """Learn merges: repeatedly join the most frequent pair of adjacent tokens inside words.

        Sennrich, Haddow and Birch, arXiv 1508.07909, on bytes as in GPT-2.

        Args:
            texts: one text, several (or pieces of one), or a mapping word -> number of occurrences.
            vocab_size: number of tokens, at least 257 (bytes and <|endoftext|>). A small text gives fewer, because
                pairs that occur once are not merged.
        Raises:
            ValueError: vocab_size too small, or a text with a lone surrogate.
        """
        if vocab_size < 257:
            raise ValueError(
                f"BPETokenizer.train: vocab_size is {vocab_size}; expected at least 257, for the 256 "
                f"bytes and {END_OF_TEXT} - try 512 for a tiny text, 8192 for a book"
            )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # without <|endoftext|>
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        rust = RustTokenizer(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.train_from_iterator(_checked(texts), trainer)
        merges = loads(rust.to_str())["model"]["merges"]
        return cls.from_merges([(first, second) for first, second in merges])


class GPT2Tokenizer(BPETokenizer):
    """The tokenizer of GPT-2 and GPT-3 (50257 tokens), from data in the package."""

    kind = "gpt2"

    def __init__(self) -> None:
        merges = parse_merges("gpt2_vocab.bpe", read_asset("gpt2_vocab.bpe").decode("utf-8"))
        super().__init__(_usual_vocab(merges), merges)


def _usual_vocab(merges: Iterable[Merge]) -> dict[str, int]:
    """token -> id in GPT-2's order: the bytes, the merged tokens, <|endoftext|>."""
    return {token: i for i, token in enumerate([*map(_write, _ranks(merges)), END_OF_TEXT])}


def _write(token: bytes) -> str:
    return "".join(map(_CHARACTER.__getitem__, token))


def _ranks(merges: Iterable[Merge]) -> dict[bytes, int]:
    """token -> rank: the single bytes, then each merged token in the order of its first merge."""
    ranks = {bytes([byte]): rank for rank, byte in enumerate(_CHARACTER)}
    for first, second in merges:
        try:
            token = bytes(map(_BYTE.__getitem__, first + second))
        except KeyError as error:
            raise ValueError(
                f"BPETokenizer: merge {first!r} {second!r} has {error.args[0]!r}, which stands for no byte "
                "in GPT-2's alphabet; the merges belong to another kind of tokenizer"
            ) from None
        ranks.setdefault(token, len(ranks))
    return ranks


def _check_vocab(vocab: dict[str, int], tokens: list[str]) -> None:
    missing = [token for token in tokens if token not in vocab]
    if missing:
        raise ValueError(
            f"BPETokenizer: vocab lacks {len(missing)} tokens, the first {missing[0]!r}; expected all 256 "
            "bytes and the result of every merge - vocab.json and merges.txt belong to different tokenizers, "
            "or one of them is cut short"
        )
    if len(set(vocab.values())) < len(vocab) or min(vocab.values()) < 0:
        raise ValueError("BPETokenizer: vocab gives two tokens one id, or has a negative id; vocab.json is damaged")


def _checked(texts: str | Iterable[str] | Mapping[str, int]) -> Iterator[str]:
    """The texts in short pieces: the trainer needs some hundred bytes a character of each piece."""
    counted = texts.items() if isinstance(texts, Mapping) else ((text, 1) for text in as_texts(texts))
    for text, count in counted:
        check_text("BPETokenizer", text)
        for piece in pieces(blocks_of(text, _PIECE), GPT2):
            for short in [piece] if len(piece) <= _LONGEST else blocks_of(piece, _PIECE):
                yield from repeat(short, count)
