"""Prompts: read in every form, and checked.  B rows, T positions."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from gptfast.generation.config import GenerationConfig
from gptfast.generation.sequences import LanguageModel


def read_prompts(ids: Any, model: LanguageModel, config: GenerationConfig) -> list[list[int]]:
    """The prompts as lists of ids.

    Args:
        ids: (B, T) or (T,) integer tensor or numpy array, a list of id lists (or 1-D tensors or arrays) of any lengths,
            or one list of ids.
        model: whose vocabulary and block_size they must fit.
        config: see `check_prompt`.
    Raises:
        TypeError, ValueError: not that, empty, outside the vocabulary, or too long.
    """
    rows = [read_prompt(f" {n}", row) for n, row in enumerate(_split(ids))]
    if not rows:
        raise ValueError("generate: ids holds no prompts; give at least one")
    for n, row in enumerate(rows):
        check_prompt(f" {n}", row, model.config.vocab_size, model.config.block_size, config)
    return rows


def _split(ids: Any) -> Sequence[Any]:
    """One entry per prompt."""
    if _is_array(ids):
        if ids.ndim not in (1, 2) or str(ids.dtype).removeprefix("torch.")[:3] not in ("int", "uin"):
            what = "tensor" if isinstance(ids, Tensor) else "array"
            raise TypeError(
                f"generate: ids is a {ids.dtype} {what} of shape {tuple(ids.shape)}; expected (B, T) token ids"
            )
        return ids.tolist() if ids.ndim == 2 else [ids.tolist()]
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise TypeError(f"generate: ids is a {type(ids).__name__}; expected a (B, T) tensor or a list of id lists")
    return [ids] if ids and isinstance(ids[0], Integral) else ids


def _is_array(ids: Any) -> bool:
    """A tensor or a numpy array; numpy itself need not be there."""
    return hasattr(ids, "tolist") and hasattr(ids, "dtype")


def read_prompt(which: str, row: Any) -> list[int]:
    """One prompt as a list of ids, which are not checked. `which`: as in `check_prompt`."""
    row = row.tolist() if _is_array(row) else row
    if not isinstance(row, Sequence):
        raise TypeError(f"generate: prompt{which} is {row!r}; expected a list of token ids")
    for token in row:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise TypeError(f"generate: prompt{which} holds {token!r}; expected int token ids - encode the text first")
    return [int(token) for token in row]


def check_prompt(which: str, row: Sequence[int], V: int, limit: int, config: GenerationConfig) -> None:
    """A prompt and the ids of `config` fit the vocabulary, and the new tokens fit behind the prompt (or slide).

    Args:
        which: " 3", to name one prompt of several; "": there is one.
        row: its ids.
        V, limit: the size of the vocabulary and the most positions.
        config: see above.
    Raises:
        TypeError, ValueError: they do not.
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
            f"generate: prompt{which} is empty; give at least one token, such as the end-of-text token or a newline"
        )
    check_ids(which, row, V)
    wanted = len(row) + config.max_new_tokens
    if wanted > limit and config.overflow == "error":
        raise ValueError(
            f"generate: prompt{which} has {len(row)} tokens and max_new_tokens is {config.max_new_tokens}, together "
            f"{wanted}, but block_size is {limit}; {_remedy(len(row), limit, config.max_new_tokens)}"
        )


def check_ids(which: str, row: Sequence[int], V: int) -> None:
    """Raise ValueError for a token id outside [0, V)."""
    for token in row:
        if not 0 <= token < V:
            raise ValueError(
                f"generate: prompt{which} holds token id {token}; expected ids in [0, {V}), the vocabulary of this model "
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
