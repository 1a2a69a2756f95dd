"""The files of tokenizers that are a list of tokens (characters, words).

They are written for the `tokenizers` library and transformers; an older format of gptfast is still read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from gptfast._json import NULL, expect, field, items, read_json
from gptfast._snapshots import current
from gptfast.tokenizer.added import CONFIG, FLAGS

FILE_NAME = "tokenizer.json"
KIND = "gptfast_kind"  # in tokenizer_config.json


def list_content(kind: str, ids: Mapping[str, int], pattern: str, specials: Mapping[str, str]) -> dict[str, bytes]:
    """The content of tokenizer.json and tokenizer_config.json.

    Args:
        kind: "char" or "word".
        ids: token -> id, for ids 0, 1, 2, ….
        pattern: regular expression of Oniguruma that matches each piece of a text that can be a token.
        specials: names such as "unk_token" -> token.
    """
    flags = {**dict.fromkeys(FLAGS, False), "special": True}
    added = sorted({ids[token]: token for token in specials.values()}.items())
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": specials.get("unk_token", "<|unk|>")},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, KIND: kind}
    return {
        FILE_NAME: json.dumps(spec, ensure_ascii=False).encode(),
        CONFIG: json.dumps({**config, **specials}, indent=2).encode(),
    }


def read_list(folder: str | os.PathLike[str], kind: str) -> list[str]:
    """The tokens of a folder, ordered by id.

    Raises:
        OSError, ValueError: a missing or damaged file, or one of another kind.
    """
    path = current(folder, FILE_NAME)
    content = read_json(path)
    found = kind_of(folder)
    if found != kind:
        raise ValueError(f"{path}: kind is {found!r}; expected {kind!r} - use load_tokenizer(folder)")
    return _by_id(content, path) if isinstance(content, dict) and "model" in content else _listed(content, path)


def _by_id(content: dict[str, Any], path: Any) -> list[str]:
    vocab = field(field(content, "model", dict, path), "vocab", dict, path, inside="model")
    tokens = sorted(vocab, key=lambda token: expect(vocab[token], int, f"model.vocab[{token!r}]", path))
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"{path}: the ids of model.vocab are not 0 to {len(tokens) - 1}; the file is damaged")
    return tokens


def _listed(content: Any, path: Any) -> list[str]:
    version = field(content, "version", int, path)
    if version != 1:
        raise ValueError(f"{path}: version is {version}; expected 1 - update gptfast")
    return items(field(content, "tokens", list, path), str, "tokens", path)


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
