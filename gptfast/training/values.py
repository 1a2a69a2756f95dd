"""Models without values, and the values of their parameters one after the other: no process that keeps a part of a model has
it whole before it is divided."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.config import GPTConfig
from gptfast.models import GPT
from gptfast.models.locate import resolve
from gptfast.models.pretrained import on_meta, read_lazily
from gptfast.models.stored import StoredModel
from gptfast.nn.experts import ExpertMLP

Values = Callable[[str], Tensor]  # of the parameter's name


def initial(config: GPTConfig, seed: int) -> tuple[GPT, Values]:
    """A GPT on the meta device, and the bits that `GPT(config)` has after torch.manual_seed(seed).

    The values are to be taken once each, in the order of named_parameters.
    """
    model = on_meta(GPT, config)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def draw(name: str) -> Tensor:
        if name == next(iter(shapes)):
            torch.manual_seed(seed)
            _draw_of_constructors(model)
        parameter = nn.Parameter(torch.ones(shapes[name]))  # those of a LayerNorm stay
        model.init_parameter(name, parameter)
        return parameter.detach()

    return model, draw


def _draw_of_constructors(model: GPT) -> None:
    """Take from torch's generator what the constructors take before the model's own values."""
    for module in model.modules():
        if isinstance(module, ExpertMLP):
            for matrix in (module.gate_up_proj, module.down_proj):
                torch.empty(matrix.shape).normal_()
        elif isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim)


def stored(path: str | os.PathLike[str], **changes: Any) -> tuple[GPT, Values]:
    """The model of a checkpoint on the meta device, and its values in float32, each read when it is asked for.

    Args:
        path, changes: as in `GPT.from_pretrained`.
    Raises:
        Whatever that raises.
    """
    return read_lazily(GPT, StoredModel(resolve(path)), changes)
