"""The feed-forward half of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast.nn.adapted import call
from gptfast.nn.linear import Linear
from gptfast.nn.selection import Selection

if TYPE_CHECKING:
    from gptfast.config import GPTConfig


class MLP(torch.nn.Module):
    """c_proj(activation(c_fc(x))) with GPT-2's parameter names; bias and GELU are one pass.

    Args:
        config: uses n_embd, inner_dim, bias and activation.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner_dim, bias=config.bias, activation=config.activation)
        self.c_proj = Linear(config.inner_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, adapters: Selection | None = None) -> Tensor:
        """(..., C) -> (..., C). The dropout after the projection belongs to `Block`. adapters: None: the active ones."""
        return call(self.c_proj, adapters, call(self.c_fc, adapters, x))
