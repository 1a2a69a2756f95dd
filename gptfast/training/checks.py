"""Checks that a model, a configuration and tokens fit together."""

from __future__ import annotations

import numpy as np
import torch

from gptfast.data import Mixture, TokenFile
from gptfast.models import BERT, GPT
from gptfast.training.config import TrainConfig
from gptfast.training.ranks import Ranks


def check_model(model: GPT | BERT, config: TrainConfig, *tokens: TokenFile | Mixture | np.ndarray) -> int:
    """Check that model, config and tokens fit together; returns T."""
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
    if config.block_size is not None and config.block_size > limit:
        raise ValueError(
            f"Trainer: block_size is {config.block_size} but the model takes at most {limit} tokens; use a block_size "
            f"up to {limit}, or a model with a larger one"
        )
    return config.block_size or limit


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
