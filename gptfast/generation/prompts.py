"""Prompts: conversion from the forms that callers use, and checks.  B prompts, T positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from gptfast.generation.config import GenerationConfig
from gptfast.generation.runner import LanguageModel, virtual_tokens
from gptfast.nn.selection import AdapterState, check_separate, one_a_row


@dataclass(frozen=True)
class Prompts:
    """The prompts of a call.

    rows: the tokens of each prompt, without padding.
    given: each prompt as it was given, with its padding.
    device: device of the tensor that held them; None: they were not in a tensor.
    adapters: the adapter of each prompt, checked by the runner; None: the active ones.
    prefixes: the vectors before each prompt, (n, C); None: there are none.
    """

    rows: list[list[int]]
    given: list[list[int]]
    device: torch.device | None
    adapters: list[str | None]
    prefixes: list[Tensor | None]

    def returned(self, texts: list[list[int]], config: GenerationConfig) -> Any:
        """The texts in the form of the prompts: a tensor, or id lists; with the padding of the prompts.

        Args:
            texts: prompt and new tokens; the same number for each prompt, one after another.
        Returns:
            (texts, longest) int64 with shorter texts filled with pad_token_id, or the first end token; or id lists.
        """
        copies = len(texts) // len(self.rows)
        whole = [
            self.given[n // copies] + text[len(self.rows[n // copies]) :] if self.given is not self.rows else text
            for n, text in enumerate(texts)
        ]
        if self.device is None:
            return whole
        fill = (config.eos_ids or (0,))[0] if config.pad_token_id is None else config.pad_token_id
        longest = max(map(len, whole))
        filled = [text + [fill] * (longest - len(text)) for text in whole]
        return torch.tensor(filled, dtype=torch.int64, device=self.device)


def read_prompts(
    ids: Any,
    mask: Any,
    model: LanguageModel,
    config: GenerationConfig,
    adapter_names: Any = None,
    prefix_embeds: Any = None,
) -> tuple[Prompts, GenerationConfig]:
    """Read the prompts of a call; returns them, and the config with its max_new_tokens (`GenerationConfig.with_room`).

    Args:
        ids: (B, T) or (T,) integer tensor or numpy array, a list of id lists (or 1-D tensors or arrays) of any lengths,
            or one list of ids.
        mask: shaped as ids: 0 for padding, 1 otherwise. None: in a (B, T) tensor or array, `pad_token_id` at both ends of a
            row is padding, if there are end tokens and it is none of them.
        model: its vocabulary and block_size are checked.
        config: see `check_prompt`.
        adapter_names: the adapter of each prompt; None: the active ones for all.
        prefix_embeds: see `read_prefixes`.
    Raises:
        TypeError, ValueError: another type, no prompts, ids outside the vocabulary, prompts that are too long, or
            adapter_names while adapters are merged.
    """
    given = [read_prompt(f" {n}", row) for n, row in enumerate(_split("ids", ids))]
    if not given:
        raise ValueError("generate: ids holds no prompts; give at least one")
    if mask is not None:
        rows = _without_padding(given, mask)
    elif _is_array(ids) and ids.ndim == 2 and config.pad_token_id is not None:
        pad = config.pad_token_id
        rows = [_stripped(row, pad) for row in given] if config.eos_ids and pad not in config.eos_ids else given
    else:
        rows = given
    adapters: list[str | None] = [None] * len(rows)
    if adapter_names is not None:
        adapters[:] = one_a_row("generate", adapter_names, len(rows))
        if isinstance(state := getattr(model, "adapters", None), AdapterState):
            check_separate("generate", state)
    prefixes = read_prefixes(prefix_embeds, len(rows), model.config.n_embd)
    virtual, limit = [virtual_tokens(model, adapter) for adapter in adapters], model.config.block_size
    virtual = [n + (0 if own is None else len(own)) for n, own in zip(virtual, prefixes, strict=True)]
    longest = max(len(row) + own for row, own in zip(rows, virtual, strict=True))
    config = config.with_room(max(map(len, given)), longest, limit)
    for n, (row, own, prefix) in enumerate(zip(rows, virtual, prefixes, strict=True)):
        before = 0 if prefix is None else len(prefix)
        check_prompt(f" {n}", row, model.config.vocab_size, limit - own, config, own, before)
    return Prompts(rows, given, ids.device if isinstance(ids, Tensor) else None, adapters, prefixes), config


def read_prefixes(given: Any, rows: int, C: int) -> list[Tensor | None]:
    """The vectors before each prompt; None: there are none.

    Args:
        given: (B, n, C) floats, or a list of (n, C) for each prompt; None: no prompt has any.
        rows: number of prompts.
        C: width of the model.
    Raises:
        TypeError, ValueError: another type or number, or vectors of another width.
    """
    if given is None:
        return [None] * rows
    if not isinstance(given, (Tensor, list, tuple)) or len(given) != rows:
        got = f"{len(given)} entries" if isinstance(given, (Tensor, list, tuple)) else type(given).__name__
        raise ValueError(
            f"generate: prefix_embeds has {got} for {rows} prompts; expected (B, n, {C}), or a list of (n, {C})"
        )
    for n, own in enumerate(given):
        if not isinstance(own, Tensor) or not own.is_floating_point():
            raise TypeError(f"generate: prefix_embeds of prompt {n} is no tensor of floats; expected (n, {C})")
        if own.dim() != 2 or own.shape[1] != C or not len(own):
            raise ValueError(
                f"generate: prefix_embeds of prompt {n} has shape {tuple(own.shape)}; expected (n, {C}) with n >= 1, vectors as "
                "wide as the model (n_embd)"
            )
    return [own.detach() for own in given]


def _without_padding(given: list[list[int]], mask: Any) -> list[list[int]]:
    """The tokens of each prompt whose mask is 1."""
    shown = [
        row.tolist() if _is_array(row) else row for row in _split("attention_mask", mask, ("int", "uin", "flo", "boo"))
    ]
    lengths = [len(row) if isinstance(row, Sequence) else -1 for row in shown]
    if lengths != [len(row) for row in given]:
        raise ValueError(
            f"generate: attention_mask has rows of {lengths} and ids of {[len(row) for row in given]}; expected one value for "
            "each token, 1, or 0 for padding"
        )
    for n, row in enumerate(shown):
        if other := [value for value in row if not isinstance(value, (int, float)) or value not in (0, 1)]:
            raise ValueError(f"generate: attention_mask holds {other[0]!r} in row {n}; expected 1, or 0 for padding")
        if row and not any(row):
            raise ValueError(f"generate: attention_mask hides all of prompt {n}; at least one token must count")
    return [
        [token for token, seen in zip(row, mask, strict=True) if seen] for row, mask in zip(given, shown, strict=True)
    ]


def _stripped(row: list[int], pad: int) -> list[int]:
    """A row without padding at its ends; unchanged if it is nothing but padding."""
    counts = [n for n, token in enumerate(row) if token != pad]
    return row[counts[0] : counts[-1] + 1] if counts else row


def _split(name: str, ids: Any, dtypes: tuple[str, ...] = ("int", "uin")) -> Sequence[Any]:
    """One entry per prompt."""
    if _is_array(ids):
        if ids.ndim not in (1, 2) or str(ids.dtype).removeprefix("torch.")[:3] not in dtypes:
            what = "tensor" if isinstance(ids, Tensor) else "array"
            expected = "token ids" if name == "ids" else "of 1, or 0 for padding"
            raise TypeError(
                f"generate: {name} is a {ids.dtype} {what} of shape {tuple(ids.shape)}; expected (B, T) {expected}"
            )
        return ids.tolist() if ids.ndim == 2 else [ids.tolist()]
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise TypeError(f"generate: {name} is a {type(ids).__name__}; expected a (B, T) tensor or a list of id lists")
    return [ids] if ids and isinstance(ids[0], Integral) else ids


def _is_array(ids: Any) -> bool:
    """Whether that is a tensor or a numpy array; without importing numpy."""
    return hasattr(ids, "tolist") and hasattr(ids, "dtype")


def read_prompt(label: str, row: Any) -> list[int]:
    """One prompt as a list of ids. Their range is not checked.

    Args:
        label: as in `check_prompt`.
        row: a list, 1-D tensor or array of integers.
    """
    row = row.tolist() if _is_array(row) else row
    if not isinstance(row, Sequence):
        raise TypeError(f"generate: prompt{label} is {row!r}; expected a list of token ids")
    for token in row:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise TypeError(f"generate: prompt{label} holds {token!r}; expected int token ids - encode the text first")
    return [int(token) for token in row]


def check_prompt(
    label: str, row: Sequence[int], V: int, limit: int, config: GenerationConfig, virtual: int = 0, before: int = 0
) -> None:
    """Check that a prompt and the ids of `config` fit the vocabulary, and that the new tokens fit behind the prompt.

    Args:
        label: inserted into error messages, e.g. " 3" for the fourth prompt; "" for the only one.
        row: token ids of the prompt.
        V: size of the vocabulary.
        limit: largest number of positions; overflow="slide" allows more.
        config: the options of the prompt.
        virtual: positions that a soft prompt and vectors before the prompt take beside the limit.
        before: those of the vectors alone.
    Raises:
        TypeError, ValueError: they do not fit.
    """
    for name, tokens in (
        ("eos_token_id is", config.eos_ids),
        ("logit_bias holds token", config.logit_bias or ()),
        ("suppress_tokens holds", config.suppress_tokens or ()),
    ):
        for token in tokens:
            if token >= V:
                raise ValueError(
                    f"generate: {name} {token}; expected ids in [0, {V}), the vocabulary of this model"
                    + (", or None - a sequence could never end with it" if name.startswith("eos") else "")
                )
    if config.usable_vocab > V:
        raise ValueError(
            f"generate: usable_vocab is {config.usable_vocab}; expected at most {V}, the model's vocabulary"
        )
    if not row:
        raise ValueError(
            f"generate: prompt{label} is empty; give at least one token, such as the end-of-text token or a newline"
        )
    check_ids(label, row, V)
    wanted = len(row) + config.max_new_tokens
    if wanted > limit and config.overflow == "error":
        asked = f"max_new_tokens is {config.max_new_tokens}"
        asked += f" (max_length is {config.max_length})" if config.max_length else ""
        taking = {0: "a soft prompt takes", virtual: "prefix_embeds take"}.get(
            before, "a soft prompt and prefix_embeds take"
        )
        said = f"{limit + virtual}, of which {taking} {virtual}" if virtual else str(limit)
        raise ValueError(
            f"generate: prompt{label} has {len(row)} tokens and {asked}, together {wanted}, but block_size is {said}; "
            f"{_remedy(len(row), limit, config.max_new_tokens)}"
        )


def check_ids(label: str, row: Sequence[int], V: int) -> None:
    """Raise ValueError for a token id outside [0, V)."""
    for token in row:
        if not 0 <= token < V:
            raise ValueError(
                f"generate: prompt{label} holds token id {token}; expected ids in [0, {V}), the vocabulary of this model "
                "- was the text encoded with another tokenizer?"
            )


def _remedy(length: int, limit: int, max_new_tokens: int) -> str:
    parts = []
    if max_new_tokens < limit:
        parts.append(f"shorten the prompt to {limit - max_new_tokens} or fewer")
    if length < limit:
        parts.append(f"ask for at most {limit - length} new tokens")
    parts = parts or [f"a prompt and its new tokens together are at most {limit}"]
    return " or ".join(parts) + "; overflow='slide' goes on by forgetting the oldest"
