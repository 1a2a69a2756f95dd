"""A BERT as a task reads it: its blocks and the pooler.  R rows, T positions, C channels, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptfast.models import BERT
from gptfast.nn import Linear

INIT_STD = 0.02


def keep_encoder(bert: BERT) -> None:
    """Take the heads of its pre-training out of a BERT, in place; a checkpoint without a pooler gets a new one, as in transformers."""
    weight = bert.wte.weight
    place = {"device": weight.device, "dtype": weight.dtype}
    if bert.pooler is None:
        C = bert.config.n_embd
        bert.pooler = Linear(C, C, activation="tanh", **place)
        nn.init.normal_(bert.pooler.weight, std=INIT_STD)
        nn.init.zeros_(bert.pooler.bias)
    bert.lm_transform = bert.next_sentence = None
    bert.lm_head = Linear(bert.config.n_embd, bert.config.vocab_size, bias=False, device="meta")
    bert.config = bert.config.replace(head_transform=False, next_sentence_head=False, pooler=True, tie_weights=True)
    bert.tie_weights()


def encoded(bert: BERT, rows: Tensor, real: Tensor, types: Tensor | None, sep: int | None) -> Tensor:
    """(R, T, C). types: (R, T), or of the ids that the rows were made of; None: as `token_types` has them."""
    types = token_types(rows, real, sep) if types is None else types.flatten(0, -2)
    return bert.hidden_states(rows, attention_mask=real, token_type_ids=types)


def check_head(lm_coef: float, places: Tensor | None) -> None:
    """Raise ValueError for arguments of `TaskModel.forward` that a BERT has no use for."""
    if lm_coef or places is not None:
        name = "mc_token_ids" if places is not None else "lm_coef"
        raise ValueError(f"TaskModel: {name} is given for a BERT, whose head reads the first token; leave it out")


def token_types(rows: Tensor, real: Tensor, sep: int | None) -> Tensor:
    """(R, T): 0 up to the first [SEP] and for padding, 1 behind it, as BERT has its two texts."""
    if sep is None:
        return torch.zeros_like(rows)
    found = (rows == sep).to(torch.int64)
    return ((found.cumsum(1) - found > 0) & real).to(rows.dtype)
