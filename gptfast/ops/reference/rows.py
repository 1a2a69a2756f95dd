"""Ops on rows of channels in eager PyTorch: normalisation, activations, dropout, embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import rng
from gptfast.ops.reference._numbers import keep_scaled, rows_of, upcast


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    xf = upcast(x)
    mean = xf.mean(-1, keepdim=True)
    var = (xf - mean).square().mean(-1, keepdim=True)
    y = (xf - mean) * torch.rsqrt(var + eps) * weight.to(xf.dtype)
    return (y if bias is None else y + bias.to(xf.dtype)).to(out_dtype or x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    first_row: int = 0,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    offset = rng.at_row("add_layer_norm", offset, first_row, math.prod(x.shape[1:-1]))
    dropped = keep_scaled(upcast(x), rows_of(x), dropout_p, seed, offset)
    total = (dropped + upcast(residual)).to(torch.promote_types(x.dtype, residual.dtype))
    return layer_norm(total, weight, bias, eps, out_dtype=out_dtype), total


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    xf = upcast(x) if bias is None else upcast(x) + bias.to(upcast(x).dtype)
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (xf + 0.044715 * xf**3)
        return (0.5 * xf * (1 + torch.tanh(inner))).to(x.dtype)
    return (0.5 * xf * (1 + torch.erf(xf * math.sqrt(0.5)))).to(x.dtype)


def _quick_gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel, arXiv 1606.08415, section 2: the sigmoid in place of Phi."""
    return x * torch.sigmoid(1.702 * x)


# beside GELU, by their names in `linear` and `GPTConfig`
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "quick_gelu": _quick_gelu, "tanh": torch.tanh}


def dropout(x: Tensor, p: float, seed: int = 0, offset: int = 0, first_row: int = 0) -> Tensor:
    offset = rng.at_row("dropout", offset, first_row, math.prod(x.shape[1:-1]))
    return keep_scaled(upcast(x), rows_of(x), p, seed, offset).to(x.dtype)


def embedding(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    x = F.embedding(ids, wte)  # B T C
    if wpe is None:
        return x
    if positions is None:
        positions = torch.arange(ids.shape[-1], device=ids.device)
    return (x + F.embedding(positions, wpe)).to(wte.dtype)
