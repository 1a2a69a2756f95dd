"""Patched modules of transformers' GPT-2 and GPT-1. Importing this imports transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.activations import GELUTanh as HFGELUTanh
from transformers.activations import NewGELUActivation as HFNewGELU
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as openai
from transformers.pytorch_utils import Conv1D as HFConv1D
from transformers.utils import logging

from gptfast import ops
from gptfast.integrations.attention import attention_forward
from gptfast.integrations.joined import is_watched
from gptfast.integrations.masks import once
from gptfast.integrations.modules import runs
from gptfast.integrations.swap import patches

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # before transformers 5.1 an argument alone said which layers are attention
    _active_collector = None

PATCHED = "gptfast_patched"  # in transformers' table of attention functions
_logger = logging.get_logger(__name__)


@patches(HFConv1D)
class Conv1D(HFConv1D):
    """transformers' `Conv1D`, a linear layer whose weight lies as (in_features, out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        if not runs(x, self.weight, self.bias) or x.shape[-1] != self.weight.shape[0]:
            return super().forward(x)
        return ops.linear(x, self.weight.t(), self.bias)


class _TanhGELU(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate="tanh") if runs(input) else super().forward(input)


@patches(HFNewGELU)
class NewGELUActivation(_TanhGELU, HFNewGELU):
    """transformers' `NewGELUActivation`, GELU by tanh."""


@patches(HFGELUTanh)
class GELUTanh(_TanhGELU, HFGELUTanh):
    """transformers' `GELUTanh`."""


class _Routed:
    """A config that names another attention, for the one module that reads it so."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return PATCHED if name == "_attn_implementation" else getattr(self._config, name)


@patches(gpt2.GPT2Attention)
class GPT2Attention(gpt2.GPT2Attention):
    """transformers' attention of GPT-2, whose own forward looks the function up by its config's name for it."""

    @property
    def config(self) -> Any:
        return _Routed(vars(self)["config"])

    @config.setter
    def config(self, value: Any) -> None:
        vars(self)["config"] = value


def _patched_attention(module: Any, *operands: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Ours, unless the weights themselves are asked for."""
    if not (options.get("output_attentions") or _weights_are_recorded()):
        return attention_forward(module, *operands, **options)
    _logger.warning_once(
        "gptfast: output_attentions was asked for, which fused attention does not have; transformers' own attention runs"
    )
    name = vars(module)["config"]._attn_implementation
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, gpt2.eager_attention_forward)(module, *operands, **options)


def _weights_are_recorded() -> bool:
    """Whether transformers collects the second results of attention layers in this call."""
    recorded = None if _active_collector is None else _active_collector.get()
    return bool(recorded) and "attentions" in recorded


ALL_ATTENTION_FUNCTIONS.register(PATCHED, _patched_attention)


@patches(openai.Attention)
class OpenAIAttention(openai.Attention):
    """transformers' attention of GPT-1."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False) -> list[Tensor]:
        if output_attentions or is_watched(self.attn_dropout):
            return super().forward(x, attention_mask, output_attentions)
        heads = (*x.shape[:-1], self.n_head, -1)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(self.split_size, dim=2))
        if not runs(q, k, v):
            return super().forward(x, attention_mask, output_attentions)
        mask = None if attention_mask is None else _causal(attention_mask, x.shape[1])
        dropout = self.attn_dropout.p if self.training else 0.0
        scale = v.shape[-1] ** -0.5 if self.scale else 1.0
        out, _ = attention_forward(self, q, k, v, mask, dropout=dropout, scaling=scale, is_causal=True)
        return [self.resid_dropout(self.c_proj(out.flatten(2)))]


@patches(openai.MLP)
class OpenAIMLP(openai.MLP):
    """transformers' MLP of GPT-1, whose GELU is one object that all models of the process share and that is left alone."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        fused = type(self.act) is HFNewGELU and runs(h) and not is_watched(self.act)
        h = ops.gelu(h, approximate="tanh") if fused else self.act(h)
        return self.dropout(self.c_proj(h))


SHARED = {id(value) for scope in (vars(activations), openai.ACT_FNS) for value in scope.values()}  # by all models


@once
def _causal(mask: Tensor, T: int) -> Tensor:
    """A mask of keys (B, 1, 1, T), 0 or the dtype's least value, together with causality: (B, 1, T, T)."""
    future = torch.ones(T, T, dtype=torch.bool, device=mask.device).triu(1)
    return mask.expand(-1, -1, T, -1).masked_fill(future, torch.finfo(mask.dtype).min)
