"""Linear layer with an optional fused activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast import ops


class Linear(torch.nn.Linear):
    """Drop-in for `torch.nn.Linear` with an optional activation, GELU fused to it: activation(x W^T + b).

    Args:
        in_features, out_features, bias, device, dtype: as in torch.
        activation: None, "gelu_tanh", "gelu" (exact), …; see `gptfast.ops.linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return ops.linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


def is_plain_linear(module: torch.nn.Module) -> bool:
    """Whether a forward of the module is a product with `module.weight` and nothing else."""
    return (
        type(module) is Linear
        and module.bias is None
        and module.activation is None
        and not (module._forward_hooks or module._forward_pre_hooks)
        and (torch.compiler.is_compiling() or "forward" not in vars(module))
    )
