"""Tokenizers: text to token ids and back."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gptfast._json import naming
from gptfast._snapshots import current, read_whole
from gptfast.tokenizer.base import END_OF_TEXT, StreamDecoder, Tokenizer, encode_prompt, lenient, token_text
from gptfast.tokenizer.bpe import BPETokenizer, GPT2Tokenizer
from gptfast.tokenizer.gpt1 import OpenAIGPTTokenizer
from gptfast.tokenizer.hf import HFTokenizer
from gptfast.tokenizer.hf_files import read_hf_files
from gptfast.tokenizer.list_files import FILE_NAME, kind_of
from gptfast.tokenizer.vocabulary import CharTokenizer, WordTokenizer
from gptfast.tokenizer.wordpiece import VOCAB, WordPieceTokenizer, is_wordpiece

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "HFTokenizer",
    "OpenAIGPTTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "WordPieceTokenizer",
    "WordTokenizer",
    "encode_prompt",
    "get_tokenizer",
    "has_tokenizer",
    "lenient",
    "load_tokenizer",
    "token_text",
]

DEFAULT_BPE_SIZE = 8192  # and of WordPiece
TRAINED = ("char", "word", "bpe", "wordpiece")  # on text


def get_tokenizer(
    name: str | os.PathLike[str],
    text: str | Iterable[str] | None = None,
    vocab_size: int | None = None,
    unk: bool = False,
) -> Tokenizer:
    """The tokenizer of a name; "char", "word", "bpe" and "wordpiece" are trained on `text`.

    Args:
        name: "gpt2", "char", "word", "bpe", "wordpiece" (lower case), or a folder with a saved tokenizer.
        text: one text or several, to train on; None where the tokenizer needs none.
        vocab_size: number of tokens for "bpe" and "wordpiece" (None: 8192) and "word" (None: every word).
        unk: for "char": encode characters that `text` does not have as <|unk|>. False: they raise an error.
    Raises:
        ValueError: an unknown name, a missing text, or a vocab_size for a tokenizer whose size is given.
    """
    if vocab_size is not None and name not in ("word", "bpe", "wordpiece"):
        raise ValueError(
            f"get_tokenizer: vocab_size is {vocab_size}, but the size of {str(name)!r} is given; "
            "leave it out, or choose 'bpe', 'wordpiece' or 'word'"
        )
    if unk and name not in ("char", "word"):
        raise ValueError(
            f"get_tokenizer: `unk` is for 'char' ('word' has it anyway), but the tokenizer is {str(name)!r}; leave it out"
        )
    if name not in TRAINED:
        return load_tokenizer(name)
    if text is None:
        raise ValueError(f"get_tokenizer: {name!r} is trained on text, but text is None; pass text=")
    if name == "char":
        return CharTokenizer.train(text, unk)
    if name == "word":
        return WordTokenizer.train(text, vocab_size)
    kind = BPETokenizer if name == "bpe" else WordPieceTokenizer
    return kind.train(text, DEFAULT_BPE_SIZE if vocab_size is None else vocab_size)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer saved in a folder, of any kind; "gpt2" is the one that the package ships.

    Reads what `save` wrote and the files of Hugging Face checkpoints (vocab.json + merges.txt, or
    tokenizer.json; BERT's vocab.txt) of GPT-2's, GPT-1's and BERT's kind.

    Raises:
        FileNotFoundError: no such folder, or none of these files in it.
        ValueError: damaged files, a tokenizer of another kind, or nanoGPT's meta.pkl, which is a pickle.
    """
    if path == "gpt2":
        return GPT2Tokenizer()
    folder = Path(path)
    pickled = folder if folder.suffix == ".pkl" else folder / "meta.pkl"
    if not folder.is_dir():
        if folder == pickled and folder.is_file():
            raise _refused(pickled)
        raise FileNotFoundError(
            f"load_tokenizer: {str(path)!r} is neither 'gpt2' nor a folder; name one of gpt2, char, word, "
            "bpe, wordpiece (the last four are trained on text), or the folder of a checkpoint or of prepared data"
        )
    try:
        return read_whole(folder, lambda: _load(folder))
    except FileNotFoundError:
        if pickled.is_file():
            raise _refused(pickled) from None
        raise


def _refused(pickled: Path) -> ValueError:
    return ValueError(
        f"{pickled} is a pickle, which can run any program, and is never loaded; nanoGPT numbers the characters of its text "
        "in Unicode order; CharTokenizer.train(text).save(FOLDER) of gptfast.tokenizer does the same - then name that FOLDER"
    )


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has files of a tokenizer."""
    return any(current(folder, name).exists() for name in (FILE_NAME, "vocab.json", VOCAB))


def _load(folder: Path) -> Tokenizer:
    file = current(folder, FILE_NAME)
    if file.exists():
        kind = kind_of(folder)
        if kind is not None:
            return {"char": CharTokenizer, "word": WordTokenizer}[kind].load(folder)
    if is_wordpiece(folder):
        with naming(folder):
            return WordPieceTokenizer.load(folder)
    found = read_hf_files(folder)
    with naming(folder):
        if not found.plain:
            return HFTokenizer(found)
        return BPETokenizer.of_files(found) if found.byte_level else OpenAIGPTTokenizer.of_files(found)
