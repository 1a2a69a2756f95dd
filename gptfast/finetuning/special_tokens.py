"""New tokens for a GPT: their ids in the tokenizer, and their rows in the embedding and the head.  C channels, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptfast.models import BERT, GPT
from gptfast.models.vocabulary import set_rows
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.extended import token_id, with_special_tokens

BOS, SEP, EOS, PAD = "bos", "sep", "eos", "pad"
USUAL = {BOS: "[BOS]", SEP: "[SEP]", EOS: "[EOS]", PAD: "[PAD]"}
BERTS = {BOS: "[CLS]", SEP: "[SEP]", EOS: "[SEP]", PAD: "[PAD]"}


def add_tokens(
    gpt: GPT | BERT, tokenizer: Tokenizer | None, tokens: Sequence[str]
) -> tuple[Tokenizer | None, dict[str, int]]:
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
    if new:
        set_rows(gpt, max(gpt.config.vocab_size, first + len(new)), first, first + len(new))
        note_new_rows(gpt, new.values())
    extended = tokenizer if tokenizer is None else with_special_tokens(tokenizer, new)
    return extended, {token: new[token] if i is None else i for token, i in known.items()}


def note_new_rows(gpt: GPT | BERT, ids: Iterable[int]) -> None:
    """Say that rows of these tokens are in no checkpoint of a model; of a BERT, which has no adapters, nothing."""
    if isinstance(gpt, GPT):
        gpt.new_rows |= frozenset(ids)


def task_tokens(
    gpt: GPT | BERT, tokenizer: Tokenizer | None, names: Sequence[str], given: Mapping[str, Any] | None
) -> tuple[Tokenizer | None, dict[str, int | None]]:
    """The delimiters of a task, made where they are new.

    Args:
        gpt, tokenizer: as `add_tokens`.
        names: those that the task needs, of "bos", "sep", "eos" and "pad".
        given: name -> text, id, or None for a row without this delimiter; what it leaves out is `USUAL`, of a BERT `BERTS`.
    Raises:
        TypeError, ValueError: no mapping, an unknown name, an id outside the vocabulary, or padding that is the end token.
    """
    usual = USUAL if gpt.config.causal else BERTS
    wanted: dict[str, Any] = {name: usual[name] for name in names}
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"TaskModel: special_tokens is {given!r}; expected a mapping such as {{'bos': '<|endoftext|>'}}"
        )
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


def delimiters_of_bert(stored: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Those that transformers' BERT puts around texts: of the tokenizer, where there is one. stored: what its checkpoint says."""
    if tokenizer is None:
        return stored
    known = {name: token_id(tokenizer, token) for name, token in BERTS.items()}
    return {**known, PAD: known[PAD] if stored.get(PAD) is None else stored[PAD]}
