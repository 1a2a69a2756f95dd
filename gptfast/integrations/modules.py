"""Patched modules of torch.nn: the same values, computed by `gptfast.ops`."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gptfast import ops
from gptfast.integrations import joined
from gptfast.integrations.swap import derive, patches

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these operands: plain tensors of one float dtype, or of any under autocast, on one device.
    What they do not take goes to torch, with torch's results and torch's errors."""
    if x.dtype not in FLOATS or x.dim() == 0 or is_wrapped(x):
        return False
    mixed = torch.is_autocast_enabled(x.device.type)
    given = [other for other in others if other is not None]
    return all(
        y.device == x.device and (y.dtype == x.dtype or (mixed and y.dtype in FLOATS)) and not is_wrapped(y)
        for y in given
    )


def is_wrapped(x: Tensor) -> bool:
    """Whether a tensor stands for others, as torchao's quantised weights and DTensor do."""
    return type(x) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(x)


@patches(nn.LayerNorm)
class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over one dimension."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None or self.weight.dim() != 1 or not runs(input, self.weight, self.bias):
            return super().forward(input)
        if input.shape[-1:] != self.weight.shape:
            return super().forward(input)
        ahead = None if torch.compiler.is_compiling() else joined.ahead()
        if ahead is not None and (known := ahead.take(self, input)) is not None:
            return known
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


@patches(nn.GELU)
class GELU(nn.GELU):
    """`torch.nn.GELU`, exact or by tanh."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate=self.approximate) if runs(input) else super().forward(input)


@patches(nn.Dropout)
class Dropout(nn.Dropout):
    """`torch.nn.Dropout`: a mask of its own for every call, seeded by torch's CPU generator."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or self.inplace or not runs(input):
            return super().forward(input)
        if not torch.compiler.is_compiling() and joined.is_held(self, input):
            return input
        return ops.dropout(input, self.p)


@patches(nn.Linear)
class Linear(nn.Linear):
    """`torch.nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        if not runs(input, self.weight, self.bias) or input.shape[-1] != self.weight.shape[1]:
            return super().forward(input)
        return ops.linear(input, self.weight, self.bias)


@patches(nn.CrossEntropyLoss)
class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` of (N, V) logits and ids."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.weight is not None or target.dtype != torch.int64 or input.dim() != 2 or not runs(input):
            return F.cross_entropy(
                input,
                target,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )
        loss = ops.cross_entropy(
            input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        return loss.to(input.dtype)


def own_gelu_class(module: nn.Module) -> type[nn.Module] | None:
    """The subclass for a GELU of another project, which is found by its name, its lack of any state, and its values."""
    if "GELU" not in type(module).__name__.upper() or list(module.parameters()) or list(module.buffers()):
        return None
    x = torch.linspace(-6, 6, 997, dtype=torch.float64, device="cpu")
    try:
        y = type(module).forward(module, x)
    except Exception:
        return None
    for approximate in ("none", "tanh"):
        if isinstance(y, Tensor) and torch.allclose(y, F.gelu(x, approximate=approximate), rtol=0, atol=1e-9):
            return _own_gelu(type(module), approximate)
    return None


@cache
def _own_gelu(original: type[nn.Module], approximate: str) -> type[nn.Module]:
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate=approximate) if runs(input) else original.forward(self, input)

    return derive(_own_gelu, original, approximate, forward=forward)
