"""Modules of any project whose forward calls functions of `torch.nn.functional`: the calls go to gptfast."""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptfast import ops
from gptfast.integrations.modules import runs
from gptfast.integrations.swap import derive


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    fits = query.dim() == 4 and key.shape == value.shape and query.shape[-1] == key.shape[-1] <= 256
    square = not is_causal or query.shape[2] == key.shape[2]  # torch aligns causality at the first key, we at the last
    same = query.shape[0] == key.shape[0] and (query.shape[1] == key.shape[1] or enable_gqa)
    if attn_mask is not None or not fits or not square or not same or not runs(query, key, value):
        return None
    return ops.causal_attention(
        query, key, value, causal=is_causal, dropout_p=dropout_p, softmax_scale=scale, enable_gqa=enable_gqa
    )


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if weight is None or weight.dim() != 1 or tuple(normalized_shape) != (input.shape[-1],):
        return None
    return ops.layer_norm(input, weight, bias, eps) if runs(input, weight, bias) else None


def _gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
    return ops.gelu(input, approximate=approximate) if runs(input) else None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    if not training or inplace or not 0 < p <= 1 or not runs(input):
        return None
    return ops.dropout(input, p)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    plain = weight is None and size_average is None and reduce is None
    if not plain or target.dtype != torch.int64 or input.dim() != 2 or not runs(input):
        return None
    loss = ops.cross_entropy(
        input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss.to(input.dtype)


# Each takes the arguments of its function, and returns None for what it leaves to torch.
FUNCTIONS: dict[Any, Callable[..., Tensor | None]] = {
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    F.gelu: _gelu,
    F.dropout: _dropout,
    F.cross_entropy: _cross_entropy,
}


class Reroute(TorchFunctionMode):
    """Inside, calls of the functions above are ours where ours takes the arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = FUNCTIONS.get(func)
        if ours is not None:
            with torch._C.DisableTorchFunction():
                result = ours(*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def functions_of(module: nn.Module) -> list[str]:
    """Names of the functions above that the forward of the module's class calls by itself, as F.gelu or gelu."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None:
        return []
    scope, found, value = type(module).forward.__globals__, set(), None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = scope.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, instruction.argval, None)
        elif instruction.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG"):
            value = None
        if callable(value) and value in FUNCTIONS:
            found.add(value.__name__)
    return sorted(found)


@cache
def rerouted_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class whose forward runs inside `Reroute`."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Reroute():
            return original.forward(self, *args, **kwargs)

    # with the signature that trainers read to choose a model's inputs
    forward.__wrapped__, forward.__doc__ = original.forward, original.forward.__doc__  # pyright: ignore[reportFunctionMemberAccess]
    return derive(rerouted_class, original, forward=forward)
