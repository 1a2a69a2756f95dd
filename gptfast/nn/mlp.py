"""The feed-forward half of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast import ops
from gptfast.nn.adapted import call
from gptfast.nn.linear import Linear
from gptfast.nn.selection import Selection

if TYPE_CHECKING:
    from gptfast.config import GPTConfig


class MLP(torch.nn.Module):
    """c_proj(activation(c_fc(x))) with GPT-2's parameter names; bias and GELU are one pass. With "swiglu" the first half of
    c_fc's rows make the gate.

    Args:
        config: uses n_embd, inner_dim, the biases and activation.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        bias, self.gated = config.has_bias("mlp"), config.activation == "swiglu"
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        activation = None if self.gated else config.activation
        self.c_fc = Linear(config.n_embd, config.fc_dim, bias=bias, activation=activation)
        self.c_proj = Linear(config.inner_dim, config.n_embd, bias=bias)

    def forward(self, x: Tensor, adapters: Selection | None = None) -> Tensor:
        """(..., C) -> (..., C). The dropout after the projection belongs to `Block`. adapters: None: the active ones."""
        return call(self.c_proj, adapters, self.gate(call(self.c_fc, adapters, x)))

    def gate(self, hidden: Tensor) -> Tensor:
        """What c_proj takes of what c_fc gives."""
        return ops.swiglu(hidden, alpha=self.alpha, limit=self.limit) if self.gated else hidden
