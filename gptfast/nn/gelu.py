"""GELU."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import ops


class GELU(torch.nn.GELU):
    """Drop-in for `torch.nn.GELU(approximate="none" | "tanh")`, exact by default as that, through `gptfast.ops.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        """GELU of every element; any shape."""
        return ops.gelu(input, approximate=self.approximate)
