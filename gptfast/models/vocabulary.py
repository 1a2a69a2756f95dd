"""The rows of a vocabulary in a model: its token embedding, and a head of its own."""

from __future__ import annotations

import torch
from torch import nn

from gptfast.nn.adapted import ADAPTED
from gptfast.nn.difference import is_tied
from gptfast.nn.transformer import INIT_STD, Transformer


@torch.no_grad()
def set_rows(model: Transformer, size: int, first: int, end: int) -> None:
    """Give a model a vocabulary of another size, with new rows for the tokens from `first` to `end`.

    A new row is normal with standard deviation 0.02, from torch's generator, around the mean of the rows before `first`: what
    the model knows of none of its tokens. Other rows stay.

    Args:
        model: changed in place; its embedding and head get new parameters.
        size: of the vocabulary.
        first, end: 0 < first <= end <= size.
    Raises:
        ValueError: adapters have copies or updates of the embedding or the head, in which the new tokens would have no rows.
    """
    _check_adapters(model)
    V, C = model.config.vocab_size, model.config.n_embd
    kept, tied = min(V, size), is_tied(model)
    for module in (model.wte,) if tied else (model.wte, model.lm_head):
        old = module.weight
        noise = INIT_STD * torch.randn(end - first, C, dtype=torch.float32, device="cpu")
        weight = old.new_empty(size, C)
        weight[:kept] = old[:kept]
        weight[first:end] = (old[:first].float().mean(0) + noise.to(old.device)).to(old)
        module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    model.config = model.config.replace(vocab_size=size)
    if tied:
        model.lm_head.weight = model.wte.weight
    model.wte.num_embeddings = model.lm_head.out_features = size


def _check_adapters(model: Transformer) -> None:
    aside = getattr(model.adapters, "aside", {})  # of adapters that are merged
    for name in ("wte", "lm_head"):
        if name in aside or isinstance(model.get_submodule(name), ADAPTED):
            raise ValueError(
                f"new tokens: the model has adapters with a copy or an update of {name}, in which they have no rows; give the "
                "model its tokens first (TaskModel, set_up_chat), then add_adapter"
            )
