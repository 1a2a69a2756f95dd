"""The tokenizer files of a Hugging Face checkpoint: vocab.json and merges.txt, or one tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast._files import read_text
from gptfast._folders import staged_folder
from gptfast._json import NULL, expect, field, items, read_json, short
from gptfast._snapshots import TOKENIZER, current, read_whole

Merge = tuple[str, str]
MOST_IDS = 2**31 - 1  # as sizes of models


@dataclass(frozen=True)
class HFFiles:
    """vocab: token -> id; merges: pairs, first learnt first; eos_token: as the folder's settings name it, or
    None."""

    vocab: dict[str, int]
    merges: list[Merge]
    eos_token: str | None

    @property
    def byte_level(self) -> bool:
        """True for GPT-2's kind, False for GPT-1's, whose words end in </w>."""
        return not any(token.endswith("</w>") for token in self.vocab)


def read_hf_files(folder: str | os.PathLike[str]) -> HFFiles:
    """Read the BPE vocabulary of a checkpoint folder.

    Raises:
        FileNotFoundError: neither vocab.json + merges.txt nor tokenizer.json is there.
        ValueError: a damaged file, or a tokenizer that is neither GPT-2's kind nor GPT-1's.
    """
    return read_whole(folder, lambda: _read_files(Path(folder)))


def _read_files(folder: Path) -> HFFiles:
    eos_token = _eos_token(folder)
    vocab_file, merges_file, added_file, fast_file = (
        current(folder, name) for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json")
    )
    if vocab_file.exists() and merges_file.exists():
        vocab = _check_ids(vocab_file, read_json(vocab_file))
        if added_file.exists():
            vocab |= _check_ids(added_file, read_json(added_file))
        return HFFiles(vocab, parse_merges(merges_file, read_text(merges_file)), eos_token)
    if fast_file.exists():
        return _from_fast(fast_file, eos_token)
    raise FileNotFoundError(
        f"no tokenizer in {folder}; expected tokenizer.json, or vocab.json with merges.txt - copy the "
        "tokenizer's files there, or name another folder"
    )


def write_hf_files(
    folder: str | os.PathLike[str],
    vocab: Mapping[str, int],
    merges: Sequence[Merge],
    config: Mapping[str, Any],
) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, in the place of the tokenizer that was there; all or
    nothing."""
    by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges), ""]
    with staged_folder(folder, replaces=TOKENIZER) as stage:
        (stage / "vocab.json").write_bytes(json.dumps(by_id).encode("ascii"))
        (stage / "merges.txt").write_bytes("\n".join(lines).encode("utf-8"))
        (stage / "tokenizer_config.json").write_bytes(json.dumps(config, indent=2).encode("ascii"))


def parse_merges(source: str | os.PathLike[str], text: str) -> list[Merge]:
    """The pairs in a merges.txt or vocab.bpe: a "#version" line, then one pair a line."""
    merges = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise ValueError(
                f"{source}: line {number} is {line!r}; expected two tokens with one space between them - "
                "the file is damaged"
            )
        merges.append((pair[0], pair[1]))
    return merges


def _from_fast(path: Path, eos_token: str | None) -> HFFiles:
    """The vocabulary inside a tokenizer.json as the `tokenizers` library writes it."""
    found = read_json(path)
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not _supported(found, path):
        raise ValueError(
            f"{path} is not a tokenizer that gptfast knows; expected GPT-2's byte-level BPE (ByteLevel "
            "pre-tokenizer without prefix space), GPT-1's BPE (</w>), or a file that gptfast wrote"
        )
    vocab = field(model, "vocab", dict, path, {}, inside="model")
    for n, token in enumerate(field(found, "added_tokens", list, path, [])):
        inside = f"added_tokens[{n}]"
        vocab[field(token, "content", str, path, inside=inside)] = field(token, "id", int, path, inside=inside)
    pairs = items(field(model, "merges", list, path, [], inside="model"), (str, list), "model.merges", path)
    return HFFiles(_check_ids(path, vocab), [_pair(n, pair, path) for n, pair in enumerate(pairs)], eos_token)


def _pair(n: int, pair: str | list[Any], path: Path) -> Merge:
    halves = pair.split(" ") if isinstance(pair, str) else pair  # old files: "a b"
    if len(halves) != 2 or not all(isinstance(half, str) for half in halves):
        raise ValueError(f"{path}: model.merges[{n}] is {short(pair)}; expected two tokens - the file is damaged")
    return halves[0], halves[1]


def _supported(found: dict[str, Any], path: Path) -> bool:
    if found["model"].get("end_of_word_suffix") == "</w>":
        return True
    split = field(found, "pre_tokenizer", (dict, NULL), path, None) or {}
    return (
        split.get("type") == "ByteLevel"
        and not split.get("add_prefix_space")
        and split.get("use_regex", True)
        and not found.get("normalizer")
    )


def _check_ids(path: Path, vocab: Any) -> dict[str, int]:
    """An object of token: id, as it is in vocab.json and elsewhere."""
    for token, i in expect(vocab, dict, "", path).items():
        if type(i) is not int or not 0 <= i < MOST_IDS:
            i = expect(i, int, f"the id of {short(token)}", path)
            raise ValueError(f"{path}: the id of {short(token)} is {short(i)}; expected 0 to {MOST_IDS - 1}")
    return vocab


def _eos_token(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if current(folder, name).exists():
            path = current(folder, name)
            token = field(read_json(path), "eos_token", (str, dict, NULL), path, None)
            if isinstance(token, dict):  # an AddedToken is written as an object
                token = field(token, "content", str, path, inside="eos_token")
            if token:
                return token
    return None
