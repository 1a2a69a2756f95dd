"""Added tokens and settings of a Hugging Face tokenizer folder, gathered from its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptfast._files import read_text
from gptfast._json import NULL, expect, field, read_json
from gptfast._snapshots import current

END_OF_TEXT = "<|endoftext|>"
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"  # where transformers >= 4.52 writes what tokenizer_config.json held
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of special_tokens_map.json and tokenizer_config.json, which takes precedence, and a template beside them."""
    found: dict[str, Any] = {}
    for name in (MAP, CONFIG):
        path = current(folder, name)
        if path.exists():
            found |= expect(read_json(path), dict, "", path)
    path = current(folder, TEMPLATE)
    if path.exists():
        found["chat_template"] = read_text(path)
    return found


def template_of(settings: dict[str, Any]) -> str | None:
    """The chat template of settings: a text, or of several the one that is called "default"."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def named_token(settings: dict[str, Any], name: str, folder: Path) -> str | None:
    """The token that the settings name as "eos_token", "bos_token" or the like; None without one."""
    value = settings.get(name)
    return None if value is None else _added(value, name, folder / CONFIG, special=True)["content"]


def gather(folder: Path, settings: dict[str, Any], vocab: dict[str, int], given: list[Any]) -> list[dict[str, Any]]:
    """All added tokens with their flags, ordered by id, as transformers collects them.

    Args:
        folder: the folder of the files.
        settings: the result of `read_settings`.
        vocab: token -> id of the model. Tokens that it lacks are added to it.
        given: the list "added_tokens" of tokenizer.json.
    Raises:
        ValueError: a malformed token, or two files that disagree about an id.
    """
    found: dict[str, dict[str, Any]] = {}
    for token, i, where in _with_ids(folder, settings, given):
        content = token["content"]
        if vocab.setdefault(content, i) != i:
            raise ValueError(
                f"{where}: the id of {content!r} is {i}, but another file of {folder} says {vocab[content]}"
            )
        found[content] = token
    if END_OF_TEXT in vocab:  # a special token in transformers' GPT-2 class, with or without a setting
        found.setdefault(END_OF_TEXT, _added(END_OF_TEXT, "", folder, special=True))
    for token in _without_ids(folder, settings):
        if token["content"] not in found:
            vocab.setdefault(token["content"], max(vocab.values(), default=-1) + 1)
            found[token["content"]] = token
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"{folder}: its tokenizer gives two tokens one id; its files belong to different tokenizers")
    tokens = [{"id": vocab[content], **token} for content, token in found.items()]
    return sorted(tokens, key=lambda token: token["id"])


def _with_ids(folder: Path, settings: dict[str, Any], given: list[Any]) -> Iterator[tuple[dict[str, Any], int, Path]]:
    path = folder / "tokenizer.json"
    for n, token in enumerate(given):
        inside = f"added_tokens[{n}]"
        yield (
            _added(expect(token, dict, inside, path), inside, path),
            field(token, "id", int, path, inside=inside),
            path,
        )
    path = current(folder, ADDED)
    if path.exists():
        for content, i in expect(read_json(path), dict, "", path).items():
            yield _added(content, "", path, special=True), expect(i, int, f"the id of {content!r}", path), path
    path = folder / CONFIG
    for i, token in (field(settings, "added_tokens_decoder", (dict, NULL), path, None) or {}).items():
        if not i.isdecimal():
            raise ValueError(f"{path}: added_tokens_decoder has {i!r}; expected ids as keys - the file is damaged")
        yield _added(token, f"added_tokens_decoder.{i}", path), int(i), path


def _without_ids(folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The special tokens that the settings name."""
    path = folder / CONFIG
    for name in _NAMED:
        if settings.get(name):
            yield _added(settings[name], name, path, special=True)
    for name in _LISTS:
        value = settings.get(name) or []
        for token in value.values() if isinstance(value, dict) else expect(value, list, name, path):
            yield _added(token, name, path, special=True)


def _added(value: Any, what: str, path: Path, special: bool | None = None) -> dict[str, Any]:
    """An added token in the form of tokenizer.json, without its id."""
    given = {"content": value} if isinstance(value, str) else expect(value, (dict, str), what, path)
    content = field(given, "content", str, path, inside=what)
    if not content:
        raise ValueError(f"{path}: {what}.content is empty; expected a text - the file is damaged")
    special = field(given, "special", bool, path, False, inside=what) if special is None else special
    usual = {"normalized": not special}
    flags = {name: field(given, name, bool, path, usual.get(name, False), inside=what) for name in FLAGS}
    return {"content": content, **flags, "special": special}
