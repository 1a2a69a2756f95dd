"""Metadata of a checkpoint: end tokens, defaults of generation, and keys that gptfast does not know. Load and save keep it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptfast._json import read_json
from gptfast._snapshots import current

GENERATION = "generation_config.json"
_END = "eos_token_id"
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_USED = ("max_new_tokens", *_DRAWING, "repetition_penalty", "no_repeat_ngram_size")
_LEAST = {"max_new_tokens": 1, "top_k": 0, "no_repeat_ngram_size": 0}  # of the whole numbers


@dataclass
class Metadata:
    """The keys of config.json that are not in `GPTConfig`, and generation_config.json.

    config: keys of config.json, as they were read.
    generation: the content of generation_config.json; None: the checkpoint has no such file.
    adapters: the end tokens that the folders of adapters name, by the names of the adapters.
    """

    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] | None = None
    adapters: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def with_adapter(self, name: str, ends: tuple[int, ...]) -> Metadata:
        """A copy with the end tokens of an adapter; (): without them."""
        others = {other: tokens for other, tokens in self.adapters.items() if other != name}
        return replace(self, adapters={**others, **({name: ends} if ends else {})})

    def of_adapter(self, name: str) -> Metadata:
        """A copy with the end tokens of this adapter alone."""
        return replace(self, adapters={other: ends for other, ends in self.adapters.items() if other == name})

    def to_write(self) -> dict[str, Any] | None:
        """generation_config.json with the end tokens of the adapters; None: no file."""
        own = [token for ends in self.adapters.values() for token in ends]
        if not own:
            return self.generation
        named = list(dict.fromkeys((*own, *_ids((self.generation or {}).get(_END)), *_ids(self.config.get(_END)))))
        return {**(self.generation or {}), _END: named}

    def end_tokens(self, vocab_size: int, others: Iterable[int | None] = ()) -> tuple[int, ...]:
        """The ids that end a text: those of the adapters, of generation_config.json, of config.json, and `others` (the
        tokenizer's).

        Ids outside the vocabulary, which some checkpoints name, end nothing and are left out.
        """
        own = [token for ends in self.adapters.values() for token in ends]
        named = (*own, *_ids((self.generation or {}).get(_END)), *_ids(self.config.get(_END)), *others)
        return tuple(dict.fromkeys(token for token in named if token is not None and 0 <= token < vocab_size))

    def reply_ends(self, ends: Iterable[int], turn_ends: Iterable[int]) -> tuple[int, ...]:
        """The ids that end a reply in a chat.

        Args:
            ends: what `end_tokens` returned.
            turn_ends: what the chat template writes behind a reply. It counts unless generation_config.json lists end tokens:
                authors of a chat model list what ends its replies, which may go on after a turn (a channel for thoughts).
        """
        listed = isinstance((self.generation or {}).get(_END), list)
        return tuple(dict.fromkeys((*ends, *(() if listed else turn_ends))))

    def ends(self, vocab_size: int) -> dict[str, Any]:
        """The options eos_token_id and pad_token_id of `generate` where the caller does not name them."""
        named = [source.get("pad_token_id") for source in (self.generation or {}, self.config)]
        pads = [value for value in named if isinstance(value, int) and not isinstance(value, bool) and value >= 0]
        return {"eos_token_id": end_option(self.end_tokens(vocab_size)), "pad_token_id": pads[0] if pads else None}

    def defaults(self) -> dict[str, Any]:
        """Options of `gptfast.generation.GenerationConfig` that generation_config.json sets.

        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty and no_repeat_ngram_size; do_sample=false is
        temperature 0. Its other settings (beams, say) are kept, and not used.
        """
        given = self.generation or {}
        found = {name: given[name] for name in _USED if given.get(name) is not None}
        if given.get("do_sample") is False:
            found = {name: value for name, value in found.items() if name not in _DRAWING} | {"temperature": 0.0}
        return found


def drawing(defaults: dict[str, Any]) -> dict[str, Any]:
    """The entries of `Metadata.defaults` that apply to sampling only."""
    return {name: value for name, value in defaults.items() if name in _DRAWING}


def without_greedy(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without a temperature of 0, which would contradict a request for sampling."""
    return {name: value for name, value in options.items() if name != "temperature" or value != 0}


def metadata_of(model: Any) -> Metadata:
    """A model's metadata; empty metadata for a model that has none."""
    return getattr(model, "metadata", None) or Metadata()


def end_option(tokens: tuple[int, ...]) -> int | list[int] | None:
    """End tokens as the option eos_token_id."""
    return None if not tokens else tokens[0] if len(tokens) == 1 else list(tokens)


def read_metadata(folder: Path, extra: dict[str, Any], config_file: Path) -> Metadata:
    """The metadata of a checkpoint folder.

    Args:
        folder: with or without a generation_config.json.
        extra: the keys of its config.json that are not its shape.
        config_file: for messages.
    Raises:
        ValueError: a damaged generation_config.json, or a setting in it that cannot be used.
    """
    _check_ids(extra, config_file)
    file = current(folder, GENERATION)
    if not file.exists():
        return Metadata(extra)
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object of settings; copy the file again, or remove it")
    _check_ids(raw, file)
    for name, value in Metadata(generation=raw).defaults().items():
        whole = name in _LEAST
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not _LEAST.get(name, 0) <= value < 2**63:
            raise ValueError(
                f"{file}: {name} is {value!r}; expected a number that generation can use - correct it, or leave it out"
            )
    return Metadata(extra, raw)


def end_tokens_in(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """The end tokens that the folder of an adapter names in a generation_config.json. Raises ValueError if that is damaged."""
    read = read_metadata(Path(folder), {}, Path(folder) / GENERATION)
    return tuple(_ids((read.generation or {}).get(_END)))


def _ids(value: Any) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_ids(raw: dict[str, Any], file: Path) -> None:
    for token in _ids(raw.get(_END)):
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"{file}: {_END} is {raw[_END]!r}; expected a token id, or a list of several")
