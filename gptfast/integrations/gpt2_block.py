"""Patched blocks of transformers' GPT-2: dropout, residual sum and the LayerNorm that follows are one pass, within a block
and from one to the next. Importing this imports transformers."""

from __future__ import annotations

import inspect
from functools import cache, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.gpt2 import modeling_gpt2 as gpt2

from gptfast import ops
from gptfast.integrations.joined import ahead, holding, is_watched, looking_ahead
from gptfast.integrations.modules import GELU, Dropout, LayerNorm, runs
from gptfast.integrations.swap import derive, patches
from gptfast.integrations.transformers_gpt import Conv1D, GELUTanh, GPT2Attention, NewGELUActivation

_ARGUMENTS = inspect.signature(inspect.unwrap(gpt2.GPT2Block.forward))
# early 5.x return a tuple, with weights where they are asked for: their own forward runs
_IS_KNOWN = _ARGUMENTS.return_annotation in (Tensor, "torch.Tensor")
_ENCODER = ("encoder_hidden_states", "encoder_attention_mask")


@patches(gpt2.GPT2MLP)
class GPT2MLP(gpt2.GPT2MLP):
    """transformers' MLP of GPT-2; bias and GELU are one pass."""

    def forward(self, hidden_states: Any) -> Tensor:
        first, name = self.c_fc, _fused_gelu(self.act)
        if name is None or not _is_plain(first, hidden_states) or is_watched(self.act):
            h = self.act(first(hidden_states))
        else:
            h = ops.linear(hidden_states, first.weight.t(), first.bias, name)
        return self.dropout(self.c_proj(h))


def _is_plain(linear: nn.Module, x: Any) -> bool:
    """Whether the module is a product with its weight and nothing else, and the kernels take x."""
    if type(linear) is not Conv1D or is_watched(linear) or not isinstance(x, Tensor):
        return False
    return runs(x, linear.weight, linear.bias) and x.shape[-1] == linear.weight.shape[0]


def _fused_gelu(activation: nn.Module) -> str | None:
    if type(activation) in (NewGELUActivation, GELUTanh):
        return "gelu_tanh"
    if type(activation) is GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return None


@patches(gpt2.GPT2Block)
class GPT2Block(gpt2.GPT2Block):
    """transformers' block of GPT-2."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or not _IS_KNOWN or not _joins(self.ln_2, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        options = dict(_ARGUMENTS.bind(self, hidden_states, *args, **kwargs).arguments)
        options |= options.pop("kwargs", {})
        if any(options.pop(name, None) is not None for name in _ENCODER):
            return super().forward(hidden_states, *args, **kwargs)
        del options["self"], options["hidden_states"]
        (branch, _), p = _run(
            self.attn, "resid_dropout", self.ln_1(hidden_states), **_without_copies(self.attn, options)
        )
        h, total = _add(branch, hidden_states, self.ln_2, p)
        branch, p = _run(self.mlp, "dropout", h)
        coming = ahead()
        norm = None if coming is None else coming.norm_after(self)
        # what is recomputed in backward must not be used outside of it
        if coming is None or norm is None or (self.gradient_checkpointing and self.training) or not _joins(norm, total):
            return total + (ops.dropout(branch, p) if p > 0 else branch)
        normed, total = _add(branch, total, norm, p)
        coming.put(norm, total, normed)
        return total


@cache
def looking_ahead_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of transformers' GPT-2 without a head; it has the same `str`, by which transformers finds what to record."""

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original.forward(self, *args, **kwargs)
        with looking_ahead(_following(self)):
            return original.forward(self, *args, **kwargs)

    return derive(looking_ahead_class, original, forward=forward)


patches(gpt2.GPT2Model)(looking_ahead_class(gpt2.GPT2Model))


def _following(model: Any) -> dict[nn.Module, nn.Module]:
    """The LayerNorm after each block of a model, where no hook or wrapper stands between the two: it may write into the sum,
    which that pass has saved for backward."""
    blocks = list(model.h)
    following: dict[nn.Module, nn.Module] = {}
    for block, after in pairwise(blocks):
        if type(after) is GPT2Block and not is_watched(block) and not is_watched(after):
            following[block] = after.ln_1
    if blocks and not is_watched(blocks[-1]):
        following[blocks[-1]] = model.ln_f
    return following


def _joins(norm: Any, x: Any) -> bool:
    """Whether a sum of the residual stream x may be normalised by this LayerNorm without calling it."""
    if type(norm) is not LayerNorm or is_watched(norm) or norm.weight is None or not isinstance(x, Tensor):
        return False
    return type(norm.weight) is nn.Parameter and norm.weight.shape == x.shape[-1:] and runs(x, norm.weight, norm.bias)


def _add(branch: Tensor, residual: Tensor, norm: Any, p: float) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of total = dropout(branch) + residual."""
    return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, p)


def _run(module: Any, name: str, *args: Any, **options: Any) -> tuple[Any, float]:
    """The result of an attention or MLP and the dropout that it still has to go through: 0 where the module has done that."""
    dropout = getattr(module, name)
    waits = type(module) in (GPT2Attention, GPT2MLP) and type(dropout) is Dropout
    if not waits or is_watched(module) or is_watched(dropout):
        return module(*args, **options), 0.0
    with holding(dropout) as held:
        result = module(*args, **options)
    if held.input is None:
        return result, 0.0
    if held.input is not (result[0] if isinstance(result, tuple) else result):
        raise RuntimeError(
            f"{type(module).__name__}: its {name} is not the last that its forward does in this version of transformers; "
            "restore(model) and report this"
        )
    return result, dropout.p


def _without_copies(attention: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an attention; a cache that is filled in a training step takes the keys and values as they lie."""
    if not torch.is_grad_enabled() or is_watched(attention):
        return options
    return {name: _FirstFill(value) if type(value) is DynamicCache else value for name, value in options.items()}


class _FirstFill:
    """A `DynamicCache` whose empty layers keep the views that they are given: `torch.cat` would copy them, and backward holds
    what they are views of as it is."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        layer = self._cache.layers[layer_idx] if layer_idx < len(self._cache.layers) else None
        if type(layer) is not DynamicLayer or layer.is_initialized or self._cache.offloading or not keys.requires_grad:
            return self._cache.update(keys, values, layer_idx, *args, **options)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return keys, values
