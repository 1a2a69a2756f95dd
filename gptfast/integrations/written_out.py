"""Attention that a project writes out as two products and a softmax, as minGPT's: found by its class, its parts and its values."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.integrations.joined import is_watched
from gptfast.integrations.modules import runs
from gptfast.integrations.swap import derive

NAME = "CausalSelfAttention"


class _Parts(NamedTuple):
    """Names of a module's parts."""

    inputs: tuple[str, ...]  # one layer for queries, keys and values in this order, or three
    output: str
    dropout: str
    last_dropout: str
    mask: str


KNOWN = (
    _Parts(("c_attn",), "c_proj", "attn_dropout", "resid_dropout", "bias"),  # minGPT, nanoGPT without a fused attention
    _Parts(("query", "key", "value"), "proj", "attn_drop", "resid_drop", "mask"),  # minGPT of 2020
)


def written_out_class(module: nn.Module) -> type[nn.Module] | None:
    """The subclass for such a module; None where its forward computes something else."""
    if type(module).__name__ != NAME:
        return None
    for parts in KNOWN:
        if _has(module, parts) and _computes_the_same(module, parts):
            return _attention_class(type(module), parts)
    return None


def _has(module: Any, parts: _Parts) -> bool:
    kinds = [(name, nn.Linear) for name in (*parts.inputs, parts.output)]
    kinds += [(name, nn.Dropout) for name in (parts.dropout, parts.last_dropout)]
    if not all(isinstance(getattr(module, name, None), kind) for name, kind in kinds):
        return False
    mask, heads = getattr(module, parts.mask, None), getattr(module, "n_head", None)
    return isinstance(mask, Tensor) and mask.dim() == 4 and isinstance(heads, int)


def _computes_the_same(module: nn.Module, parts: _Parts) -> bool:
    """Whether its forward has the values of `_attend` in evaluation, and drops where that drops."""
    probe: Any = copy.deepcopy(module).to("cpu", torch.float64)
    for part in probe.modules():  # the hooks are for the model's own calls
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    T = min(5, getattr(probe, parts.mask).shape[-1])
    width = getattr(probe, parts.inputs[0]).in_features
    x = torch.linspace(-2, 2, 2 * T * width, dtype=torch.float64, device="cpu").sin().view(2, T, width)
    first, last = getattr(probe, parts.dropout), getattr(probe, parts.last_dropout)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for rates in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
            first.p, last.p = rates
            probe.train()
            try:
                got = type(module).forward(probe, x)
            except (TypeError, ValueError, RuntimeError, AttributeError):
                return False
            if not isinstance(got, Tensor) or not torch.allclose(got, _attend(probe, x, parts), rtol=0, atol=1e-9):
                return False
    return True


def _attend(module: Any, x: Tensor, parts: _Parts) -> Tensor:
    B, T, C = x.shape
    mixed = [getattr(module, name)(x) for name in parts.inputs]
    mixed = mixed if len(mixed) == 3 else mixed[0].split(C, dim=2)
    q, k, v = (part.view(B, T, module.n_head, -1).transpose(1, 2) for part in mixed)
    rate = getattr(module, parts.dropout).p if module.training else 0.0
    y = ops.causal_attention(q, k, v, dropout_p=rate).transpose(1, 2).reshape(B, T, C)
    return getattr(module, parts.last_dropout)(getattr(module, parts.output)(y))


@cache
def _attention_class(original: type[nn.Module], parts: _Parts) -> type[nn.Module]:
    def forward(self: Any, x: Tensor, *others: Any, **more: Any) -> Any:
        longest = getattr(self, parts.mask).shape[-1]
        width = self.n_head * 256  # the kernels' longest head
        seen = is_watched(getattr(self, parts.dropout))  # the fused attention does not call it
        if seen or others or more or not runs(x) or x.dim() != 3 or x.shape[1] > longest or x.shape[2] > width:
            return original.forward(self, x, *others, **more)
        return _attend(self, x, parts)

    return derive(_attention_class, original, parts, forward=forward)
