"""The tokenizer files of a Hugging Face checkpoint: vocab.json and merges.txt, or one tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast._files import read_text
from gptfast._json import NULL, expect, field, items, read_json, short
from gptfast._snapshots import current, read_whole
from gptfast.tokenizer.added import END_OF_TEXT, gather, named_token, read_settings

Merge = tuple[str, str]
_ENDS = ("bos_token", "eos_token")
MOST_IDS = 2**31 - 1  # the limit of vocab_size in GPTConfig


@dataclass(frozen=True)
class HFFiles:
    """The tokenizer files of a folder; tokenizer.json takes precedence over vocab.json and merges.txt.

    vocab: token -> id, with the added tokens.
    merges: pairs of tokens, in the order in which they were learnt.
    eos_token: the end token that the settings name, or None.
    spec: the content of tokenizer.json, or its equivalent.
    settings: the content of tokenizer_config.json and special_tokens_map.json.
    """

    vocab: dict[str, int]
    merges: list[Merge]
    eos_token: str | None
    spec: dict[str, Any]
    settings: dict[str, Any]

    @property
    def byte_level(self) -> bool:
        """True for GPT-2's kind, False for GPT-1's, whose words end in </w>."""
        return self.spec["model"].get("end_of_word_suffix") != "</w>"

    @property
    def plain(self) -> bool:
        """Whether it differs from GPT-2's or GPT-1's published tokenizer in vocabulary, merges and special tokens only."""
        spec, added = self.spec, self.spec["added_tokens"]
        post = spec.get("post_processor") or {"type": "ByteLevel"}
        names = [token["content"] for token in added]
        if not _adds_nothing(post) or any(
            not t["special"] or t["lstrip"] or t["rstrip"] or t["single_word"] for t in added
        ):
            return False
        if any(a != b and b.startswith(a) for a in names for b in names):
            return False  # the longer one is to be recognised; tiktoken does not guarantee that
        if not self.byte_level:
            same = all(_same(spec.get(part), wanted) for part, wanted in GPT1.items())
            return same and set(names) == {spec["model"].get("unk_token")}
        made = {*byte_alphabet().values(), *(a + b for a, b in self.merges)}
        if made - self.vocab.keys():  # damaged: `BPETokenizer` raises
            return True
        same = all(
            _same(spec.get(part) or (wanted if part == "decoder" else None), wanted) for part, wanted in GPT2.items()
        )
        return same and self.vocab.keys() - made == set(names) - made and not made & set(names)


GPT2 = {
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "decoder": {"type": "ByteLevel"},
}
GPT1 = {
    "normalizer": {"type": "BertNormalizer", "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of the first 256 ids.

    Bytes that Latin-1 prints come first, as themselves; the others (blanks, controls) follow as U+0100 and up.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def read_hf_files(folder: str | os.PathLike[str]) -> HFFiles:
    """Read the BPE tokenizer of a checkpoint folder.

    Raises:
        FileNotFoundError: neither vocab.json + merges.txt nor tokenizer.json is there.
        ValueError: a damaged file, files that contradict each other, or a kind of tokenizer that gptfast does not support.
    """
    return read_whole(folder, lambda: _read_files(Path(folder)))


def _read_files(folder: Path) -> HFFiles:
    settings = read_settings(folder)
    vocab_file, merges_file, fast_file = (
        current(folder, name) for name in ("vocab.json", "merges.txt", "tokenizer.json")
    )
    if fast_file.exists():
        for name in _ENDS:  # as transformers from 5 on: the post-processor of tokenizer.json counts
            settings.pop(f"add_{name}", None)
        spec = _read_fast(fast_file)
        vocab = _check_ids(fast_file, field(spec["model"], "vocab", dict, fast_file, {}, inside="model"))
        pairs = items(
            field(spec["model"], "merges", list, fast_file, [], inside="model"), (str, list), "model.merges", fast_file
        )
        merges = [_pair(n, pair, fast_file) for n, pair in enumerate(pairs)]
        _check_prefix_space(spec, settings, folder)
        given = field(spec, "added_tokens", list, fast_file, [])
    elif vocab_file.exists() and merges_file.exists():
        vocab, given = _check_ids(vocab_file, read_json(vocab_file)), []
        merges = parse_merges(merges_file, read_text(merges_file))
        spec = _usual_spec(vocab, settings)
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}; expected tokenizer.json, or vocab.json with merges.txt - copy the "
            "tokenizer's files there, or name another folder"
        )
    base = set(vocab)
    unk = spec["model"].get("unk_token")
    named = {"unk_token": unk, **settings} if unk is not None else settings
    spec["added_tokens"] = gather(folder, named, vocab, given)
    _check_ids(folder, vocab)
    if not fast_file.exists():
        _check_whole(merges_file, base - {token["content"] for token in spec["added_tokens"]}, vocab, merges)
    spec["model"] |= {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    if not fast_file.exists():
        _set_ends(spec, settings, folder)
    return HFFiles(vocab, merges, named_token(settings, "eos_token", folder), spec, settings)


def _usual_spec(vocab: dict[str, int], settings: dict[str, Any]) -> dict[str, Any]:
    """The equivalent tokenizer.json of vocab.json and merges.txt: transformers' GPT2Tokenizer or OpenAIGPTTokenizer."""
    gpt1 = any(token.endswith("</w>") for token in vocab)
    spec: dict[str, Any] = {"version": "1.0", **(GPT1 if gpt1 else GPT2), "post_processor": None}
    model: dict[str, Any] = {"type": "BPE", "fuse_unk": False}
    if gpt1:
        spec["normalizer"] = {
            **GPT1["normalizer"],
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
        }
        model |= {"unk_token": "<unk>", "end_of_word_suffix": "</w>"}
    else:
        prefix = bool(settings.get("add_prefix_space"))
        spec["pre_tokenizer"] = {**GPT2["pre_tokenizer"], "add_prefix_space": prefix, "trim_offsets": True}
        spec["decoder"] = {**GPT2["pre_tokenizer"], "trim_offsets": True}
    return {**spec, "model": model}


def _check_prefix_space(spec: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Refuse contradictory values: transformers' GPT-2 class reads tokenizer_config.json, its general class tokenizer.json."""
    split = spec.get("pre_tokenizer") or {}
    if split.get("type") != "ByteLevel":
        return
    said = settings.get("add_prefix_space", False if "GPT2" in str(settings.get("tokenizer_class")) else None)
    if said is not None and bool(said) != bool(split.get("add_prefix_space")):
        raise ValueError(
            f"{folder}: add_prefix_space is {bool(said)} by tokenizer_config.json and {bool(split.get('add_prefix_space'))} "
            "in tokenizer.json, which give different tokens; write the right one into both"
        )


def _check_whole(path: Path, base: set[str], vocab: dict[str, int], merges: list[Merge]) -> None:
    """Refuse merges that are cut short: vocab.json has a token that two others make, but no merge for it."""
    made = {first + second for first, second in merges}
    if made - vocab.keys():  # of another tokenizer: `BPETokenizer` raises
        return
    lost = [t for t in base - made if any(t[:n] in vocab and t[n:] in vocab for n in range(1, len(t)))]
    if lost:
        raise ValueError(
            f"{path}: no merge makes {len(lost)} tokens of vocab.json, such as {min(lost, key=vocab.__getitem__)!r}; it is cut "
            "short or belongs to another tokenizer - copy it again (or list added tokens in added_tokens.json)"
        )


def _set_ends(spec: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Apply add_bos_token and add_eos_token as transformers does to vocab.json and merges.txt."""
    flags = {name: settings.get(f"add_{name}") for name in _ENDS}
    if all(flag is None for flag in flags.values()):
        return
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for name, flag in flags.items():
        token = named_token(settings, name, folder) or END_OF_TEXT
        if not flag:
            continue
        if token not in ids:
            raise ValueError(
                f"{folder}: add_{name} is true, but the vocabulary has no {token!r}; set {name}, or add_{name} false"
            )
        special[token] = {"id": token, "ids": [ids[token]], "tokens": [token]}
        part = {"SpecialToken": {"id": token, "type_id": 0}}
        single = [part, *single] if name == "bos_token" else [*single, part]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    spec["post_processor"] = template if special else None


def _adds_nothing(post: dict[str, Any]) -> bool:
    """Whether a post-processor keeps the ids of a single text; transformers from 5 on writes a template that does."""
    if post["type"] == "TemplateProcessing":
        single = post.get("single")
        return isinstance(single, list) and len(single) == 1 and isinstance(single[0], dict) and "Sequence" in single[0]
    return post["type"] == "ByteLevel"


def _same(part: Any, wanted: dict[str, Any] | None) -> bool:
    """Whether a part of tokenizer.json has the wanted settings; missing keys have the library's defaults."""
    if wanted is None or part is None:
        return part == wanted
    usual = {"use_regex": True, "add_prefix_space": False}
    return all(part.get(key, usual.get(key)) == value for key, value in wanted.items())


def hf_content(vocab: Mapping[str, int], merges: Sequence[Merge], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The content of vocab.json, merges.txt and tokenizer_config.json."""
    by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges), ""]
    return {
        "vocab.json": json.dumps(by_id).encode("ascii"),
        "merges.txt": "\n".join(lines).encode("utf-8"),
        "tokenizer_config.json": json.dumps(config, indent=2).encode("ascii"),
    }


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


def _read_fast(path: Path) -> dict[str, Any]:
    """The content of a tokenizer.json whose tokens are bytes, or words that end in </w>."""
    found = read_json(path)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if field(found, part, (dict, NULL), path, None) is not None:
            field(found[part], "type", str, path, inside=part)
    model = found.get("model") if isinstance(found, dict) else None
    decoder, split = (field(found, name, (dict, NULL), path, None) or {} for name in ("decoder", "pre_tokenizer"))
    kind = (decoder or split).get("type")  # without a decoder the pre-tokenizer tells
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or (kind not in ("ByteLevel", "BPEDecoder") and model.get("end_of_word_suffix") != "</w>")
    ):
        raise ValueError(
            f"{path} is not a tokenizer that gptfast supports; expected a BPE of bytes (ByteLevel decoder) as GPT-2's, GPT-1's BPE "
            "(</w>), or a file that gptfast wrote"
        )
    return {**found, "model": dict(model)}


def _pair(n: int, pair: str | list[Any], path: Path) -> Merge:
    halves = pair.split(" ") if isinstance(pair, str) else pair  # old files: "a b"
    if len(halves) != 2 or not all(isinstance(half, str) for half in halves):
        raise ValueError(f"{path}: model.merges[{n}] is {short(pair)}; expected two tokens - the file is damaged")
    return halves[0], halves[1]


def _check_ids(path: Path, vocab: Any) -> dict[str, int]:
    """Check a mapping token -> id, as in vocab.json."""
    for token, i in expect(vocab, dict, "", path).items():
        if type(i) is not int or not 0 <= i < MOST_IDS:
            i = expect(i, int, f"the id of {short(token)}", path)
            raise ValueError(f"{path}: the id of {short(token)} is {short(i)}; expected 0 to {MOST_IDS - 1}")
    return vocab
