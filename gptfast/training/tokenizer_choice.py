"""The tokenizer of a run, and the check that a checkpoint and the data mean the same by an id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptfast.data import PreparedData, is_tokens
from gptfast.models import BERT, GPT
from gptfast.models.locate import resolve
from gptfast.tokenizer import has_tokenizer, load_tokenizer
from gptfast.training.options import defaults_of

GPT2_SIZES = (50257, 50304)  # of GPT-2's vocabulary: as it is, and padded as nanoGPT does


def tokenizer_of(options: Mapping[str, Any], model: GPT | BERT | None) -> str | None:
    """The requested tokenizer, else the checkpoint's, else the default; None for data that is tokens already."""
    if "tokenizer" in options or is_tokens(options["data"]):
        return options.get("tokenizer")
    if model is None:
        return defaults_of(options)["tokenizer"]
    folder = resolve(options["init_from"])
    if not has_tokenizer(folder):
        size = model.config.vocab_size
        hint = "`tokenizer` gpt2, if it was trained with GPT-2's tokens" if size in GPT2_SIZES else "`tokenizer` FOLDER"
        raise ValueError(
            f"train: {options['init_from']} has no tokenizer and a vocabulary of {size}; say which with {hint}"
        )
    return str(folder)


def check_ids(options: Mapping[str, Any], data: PreparedData) -> None:
    """Refuse ids that stand for other text in the checkpoint that training starts from.

    Raises:
        ValueError: there is such an id.
    """
    folder, tokenizer = resolve(options["init_from"]), data.tokenizer
    if not has_tokenizer(folder):
        return
    try:
        own = load_tokenizer(folder)
    except ValueError:
        if "tokenizer" not in options:
            raise
        return  # an unsupported kind: the user has named another one
    for token in filter(own.has_token, range(min(own.vocab_size, tokenizer.vocab_size))):
        if tokenizer.has_token(token) and (a := own.decode_bytes([token])) != (b := tokenizer.decode_bytes([token])):
            if "tokenizer" in options:
                cause = f"`tokenizer` {options['tokenizer']} has other ids than {options['init_from']}"
                remedy = "leave `tokenizer` out to use the checkpoint's own"
            else:
                cause = f"`data` {options['data']} was prepared with other ids than {options['init_from']} has"
                remedy = f"prepare it with `tokenizer` {options['init_from']}"
            raise ValueError(
                f"train: {cause}: {token} is {a!r} to the model and {b!r} in the text; {remedy}, or leave `init_from` out"
            )
