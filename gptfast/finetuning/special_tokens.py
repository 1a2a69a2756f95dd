"""New tokens for a GPT: their ids in the tokenizer, and their rows in the embedding and the head.  C channels, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gptfast.models import GPT
from gptfast.nn.difference import is_tied
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.extended import token_id, with_special_tokens

BOS, SEP, EOS, PAD = "bos", "sep", "eos", "pad"
USUAL = {BOS: "[BOS]", SEP: "[SEP]", EOS: "[EOS]", PAD: "[PAD]"}
_STD = 0.02  # around the mean of all rows: what the model knows of none of its tokens


def add_tokens(gpt: GPT, tokenizer: Tokenizer | None, tokens: Sequence[str]) -> tuple[Tokenizer | None, dict[str, int]]:
    """Give tokens ids and rows; those that the tokenizer has keep theirs.

    A new id is the first that the tokenizer has no token for. Its row in the embedding, and in a head of its own, starts
    at the mean of the tokenizer's rows plus noise of standard deviation 0.02 from torch's generator. The vocabulary of
    the model grows where it has no spare rows.

    Args:
        gpt: changed in place, if it lacks rows.
        tokenizer: None: every token is new, with ids from the model's vocab_size on.
        tokens: texts, such as "[SEP]".
    Returns:
        The tokenizer with them, and the id of each.
    Raises:
        TypeError, ValueError: a text that is empty or no text, or a tokenizer with more tokens than the model has rows.
    """
    for token in tokens:
        if not isinstance(token, str) or not token:
            raise TypeError(f"special tokens: {token!r} is no token; expected a text that is not empty, or an id")
    known = {token: None if tokenizer is None else token_id(tokenizer, token) for token in tokens}
    first = gpt.config.vocab_size if tokenizer is None else tokenizer.vocab_size
    if first > gpt.config.vocab_size:
        raise ValueError(
            f"special tokens: the tokenizer has {first} tokens and the model {gpt.config.vocab_size} rows; use the model's own"
        )
    missing = [token for token, i in known.items() if i is None]
    new = {token: first + n for n, token in enumerate(missing)}
    _make_rows(gpt, first, first + len(new))
    extended = tokenizer if tokenizer is None else with_special_tokens(tokenizer, new)
    return extended, {token: new[token] if i is None else i for token, i in known.items()}


def task_tokens(
    gpt: GPT, tokenizer: Tokenizer | None, names: Sequence[str], given: Mapping[str, Any] | None
) -> tuple[Tokenizer | None, dict[str, int | None]]:
    """The delimiters of a task, made where they are new.

    Args:
        gpt, tokenizer: as `add_tokens`.
        names: those that the task needs, of "bos", "sep", "eos" and "pad".
        given: name -> text, id, or None for a row without this delimiter; what it leaves out is `USUAL`.
    Raises:
        TypeError, ValueError: an unknown name, an id outside the vocabulary, or padding that is the end token.
    """
    wanted: dict[str, Any] = {name: USUAL[name] for name in names}
    for name, value in (given or {}).items():
        plain = name.removesuffix("_id").removesuffix("_token") if isinstance(name, str) else name
        if plain not in USUAL:
            raise ValueError(f"TaskModel: special_tokens names {name!r}; expected names of {', '.join(USUAL)}")
        wanted[plain] = value
    V = gpt.config.vocab_size
    for name, value in wanted.items():
        if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
            raise TypeError(f"TaskModel: special_tokens[{name!r}] is {value!r}; expected a text, an id or None")
        if isinstance(value, int) and not 0 <= value < V:
            raise ValueError(f"TaskModel: special_tokens[{name!r}] is {value}; expected an id in [0, {V})")
    if wanted.get(PAD) is not None and wanted[PAD] == wanted.get(EOS):
        raise _padding_ends(wanted[PAD])
    texts = list(dict.fromkeys(value for value in wanted.values() if isinstance(value, str)))
    tokenizer, ids = add_tokens(gpt, tokenizer, texts)
    found = {name: ids[value] if isinstance(value, str) else value for name, value in wanted.items()}
    if found.get(PAD) is not None and found[PAD] == found.get(EOS):
        raise _padding_ends(found[PAD])
    return tokenizer, found


def _padding_ends(token: Any) -> ValueError:
    return ValueError(
        f"TaskModel: special_tokens gives {token!r} to pad and to eos; the end token is where the head reads, so padding needs "
        "a token of its own - leave pad out for a new one"
    )


@torch.no_grad()
def _make_rows(gpt: GPT, first: int, end: int) -> None:
    """Fresh rows for the ids from `first` to `end`."""
    if first == end:
        return
    V, C = gpt.config.vocab_size, gpt.config.n_embd
    tied = is_tied(gpt)
    for module in (gpt.wte,) if tied else (gpt.wte, gpt.lm_head):
        old = module.weight
        noise = _STD * torch.randn(end - first, C, dtype=torch.float32, device="cpu")
        rows = old[:first].float().mean(0) + noise.to(old.device)
        weight = old.new_empty(max(V, end), C)
        weight[:V] = old
        weight[first:end] = rows.to(old)
        module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    gpt.config = gpt.config.replace(vocab_size=max(V, end))
    if tied:
        gpt.lm_head.weight = gpt.wte.weight
    gpt.wte.num_embeddings = gpt.lm_head.out_features = gpt.config.vocab_size
