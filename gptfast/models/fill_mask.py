"""Filling masks with a BERT, as the fill-mask pipeline of transformers does.  T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_count
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.wordpiece import WordPieceTokenizer

_BATCH = 32  # texts of a forward
Answer = dict[str, Any]


def fill_mask(
    model: Any,
    texts: str | Sequence[str],
    tokenizer: Tokenizer,
    top_k: int = 5,
    targets: str | Sequence[str] | None = None,
) -> Any:
    """See `BERT.fill_mask`."""
    found: Any = getattr(tokenizer, "inner", tokenizer)
    if not isinstance(found, WordPieceTokenizer) or found.special_id("mask_token") is None:
        raise ValueError(
            f"fill_mask: the tokenizer is {found.kind!r} and has no [MASK]; use that of the model, a WordPiece"
        )
    if not model.config.head_transform:
        raise ValueError(
            "fill_mask: the model has no head for masks (head_transform=False); load a BertForMaskedLM or BertForPreTraining"
        )
    check_count("fill_mask", "top_k", top_k)
    several = not isinstance(texts, str)
    given = list(texts) if several else [texts]
    for text in given:
        if not isinstance(text, str):
            raise TypeError(f"fill_mask: a text is a {type(text).__name__}; expected str")
    if not given:
        raise ValueError("fill_mask: there are no texts; give at least one")
    allowed = None if targets is None else _target_ids(found, [targets] if isinstance(targets, str) else list(targets))
    if allowed is None and model.config.vocab_size > found.vocab_size:  # rows without a token, for speed
        allowed = torch.arange(found.vocab_size)
    rows = [_row(found, text, model.config.block_size) for text in given]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # rows of one length: little padding
    answers: list[Any] = [None] * len(rows)
    for first in range(0, len(order), _BATCH):
        part = order[first : first + _BATCH]
        for n, logits in zip(part, _logits(model, found, [rows[n] for n in part]), strict=True):
            answers[n] = _answers(found, rows[n], logits, top_k, allowed)
    return answers if len(answers) > 1 else answers[0]


def _row(tokenizer: WordPieceTokenizer, text: str, limit: int) -> list[int]:
    ends = (tokenizer.special_id("cls_token"), tokenizer.special_id("sep_token"))
    first, last = ([] if i is None else [i] for i in ends)
    row = [*first, *tokenizer.encode(text, allowed_special="all"), *last]
    mask = tokenizer.roles["mask_token"]
    if tokenizer.special_id("mask_token") not in row:
        raise ValueError(f"fill_mask: there is no {mask} in {text!r}; write {mask} where a word is to be filled in")
    if len(row) > limit:
        raise ValueError(
            f"fill_mask: the text has {len(row)} tokens with its ends and block_size is {limit}; shorten it"
        )
    return row


def _target_ids(tokenizer: WordPieceTokenizer, targets: list[str]) -> Tensor:
    """The ids of words, in their order. Raises ValueError for one that is not a token."""
    ids = []
    for word in targets:
        token = tokenizer.vocab.get(word)
        if token is None:
            pieces = tokenizer.encode(word)
            if len(pieces) != 1 or pieces[0] == tokenizer.special_id("unk_token"):
                cut = " ".join(tokenizer.decode_bytes([i]).decode().strip() for i in pieces)
                raise ValueError(
                    f"fill_mask: the target {word!r} is not one token ({cut}); one [MASK] stands for one token"
                )
            token = pieces[0]
        ids.append(token)
    if not ids:
        raise ValueError("fill_mask: targets is empty; give words, or leave it out")
    return torch.tensor(sorted(set(ids)))


@torch.no_grad()
def _logits(model: Any, tokenizer: WordPieceTokenizer, rows: list[list[int]]) -> list[Tensor]:
    """Of the masks of each row, (masks, V) float32, in evaluation mode."""
    T, pad, device = max(map(len, rows)), tokenizer.special_id("pad_token") or 0, model.wte.weight.device
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows], device=device)
    real = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
    training = model.training
    model.eval()
    try:
        hidden = model.hidden_states(ids, attention_mask=real if bool((real == 0).any()) else None)
        masked = (ids == tokenizer.special_id("mask_token")) & (real != 0)
        return [model.logits_of(x[where]).float().cpu() for x, where in zip(hidden, masked, strict=True)]
    finally:
        model.train(training)


def _answers(
    tokenizer: WordPieceTokenizer, row: list[int], logits: Tensor, top_k: int, allowed: Tensor | None
) -> list[Answer] | list[list[Answer]]:
    """The answers of a text: a list, or of several masks a list for each."""
    mask, specials = tokenizer.special_id("mask_token"), set(tokenizer.specials.values())
    places = [n for n, i in enumerate(row) if i == mask]
    probabilities = logits.softmax(-1)
    chosen = probabilities if allowed is None else probabilities[:, allowed]
    scores, best = chosen.topk(min(top_k, chosen.shape[1]))
    tokens = best if allowed is None else allowed[best]
    found: list[list[Answer]] = []
    for place, these, ids in zip(places, scores.tolist(), tokens.tolist(), strict=True):
        answers = []
        for score, token in zip(these, ids, strict=True):
            filled = [*row[:place], token, *row[place + 1 :]]
            shown = [i for i in filled if i not in specials] if len(places) == 1 else filled
            text = {"token_str": tokenizer.decode([token]), "sequence": tokenizer.decode(shown)}
            answers.append({"score": score, "token": token, **text})
        found.append(answers)
    return found[0] if len(found) == 1 else found
