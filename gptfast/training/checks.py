"""Checks that a model, a configuration and tokens fit together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gptfast.data import Mixture, TokenFile
from gptfast.models import BERT, GPT
from gptfast.training.config import TrainConfig
from gptfast.training.ranks import Ranks


def check_model(model: GPT | BERT, config: TrainConfig, *tokens: TokenFile | Mixture | np.ndarray) -> int:
    """Check that model, config and tokens fit together; returns T.

    Raises:
        TypeError: weights of another dtype than float32; tokens that are no ids.
        ValueError: ids or a block_size that the model does not have.
    """
    limit = model.config.block_size
    if model.wte.weight.dtype != torch.float32:
        raise TypeError(
            f"Trainer: the model's weights are {model.wte.weight.dtype}; expected float32 - load it with "
            "dtype=torch.float32 and choose the dtype of the products with TrainConfig(dtype=...)"
        )
    parts = [file for given in tokens for file in (given.files if isinstance(given, Mixture) else (given,))]
    for part in parts:
        if isinstance(part, TokenFile) and part.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"Trainer: {part.path} has ids up to {part.vocab_size - 1} but the model a vocab_size of "
                f"{model.config.vocab_size}; use the tokenizer of the model, or a model with vocab_size={part.vocab_size}"
            )
        if not isinstance(part, TokenFile):
            _check_ids(part, model.config.vocab_size)
    if config.block_size is not None and config.block_size > limit:
        raise ValueError(
            f"Trainer: block_size is {config.block_size} but the model takes at most {limit} tokens; use a block_size "
            f"up to {limit}, or a model with a larger one"
        )
    return config.block_size or limit


def _check_ids(tokens: Any, vocab_size: int) -> None:
    """Check an array of ids before a step or an evaluation meets a wrong one."""
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        array = isinstance(tokens, np.ndarray)
        got = f"an array of {tokens.dtype} and shape {tokens.shape}" if array else f"a {type(tokens).__name__}"
        raise TypeError(
            f"Trainer: tokens are {got}; expected a token file, or ids in an array of one dimension, such as np.array(ids, np.uint16)"
        )
    if isinstance(tokens, np.memmap) or not len(
        tokens
    ):  # not read from the disk for this; no tokens are told elsewhere
        return
    for wrong in (int(tokens.min()), int(tokens.max())):
        if not 0 <= wrong < vocab_size:
            raise ValueError(
                f"Trainer: tokens hold id {wrong}; expected ids in [0, {vocab_size}), the vocabulary of the model - was the text "
                "encoded with another tokenizer?"
            )


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse what the processes of a run cannot share.

    Raises:
        ValueError: a batch that does not divide, or an optimizer of whole matrices where they are divided.
    """
    ranks.rows(config.batch_size)
    if ranks.sharding and config.optimizer == "muon":
        raise ValueError(
            "train: `optimizer` is muon, which orthogonalises whole matrices, but `parallel` fsdp leaves each process a part of "
            "them; use `optimizer` adamw, or `parallel` ddp"
        )
    for name in ("ema", "compile"):
        if ranks.sharding and getattr(config, name):
            raise ValueError(
                f"train: `{name}` needs the whole model in each process, but `parallel` fsdp leaves it a part; leave `{name}` "
                "out, or use `parallel` ddp"
            )
