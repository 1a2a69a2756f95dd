"""Ops on rows of channels in eager PyTorch: normalisation, activations, dropout, positions, embedding."""

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
    total = _joined(x, residual, dropout_p, seed, offset)
    return layer_norm(total, weight, bias, eps, out_dtype=out_dtype), total


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    xf = upcast(x)
    y = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(xf.dtype)).to(out_dtype or x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    first_row: int = 0,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    offset = rng.at_row("add_rms_norm", offset, first_row, math.prod(x.shape[1:-1]))
    total = _joined(x, residual, dropout_p, seed, offset)
    return rms_norm(total, weight, eps, out_dtype=out_dtype), total


def _joined(x: Tensor, residual: Tensor, dropout_p: float, seed: int, offset: int) -> Tensor:
    """dropout(x) + residual, in the dtype that x + residual has."""
    dropped = keep_scaled(upcast(x), rows_of(x), dropout_p, seed, offset)
    return (dropped + upcast(residual)).to(torch.promote_types(x.dtype, residual.dtype))


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    xf = upcast(x) if bias is None else upcast(x) + bias.to(upcast(x).dtype)
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (xf + 0.044715 * xf**3)
        return (0.5 * xf * (1 + torch.tanh(inner))).to(x.dtype)
    return (0.5 * xf * (1 + torch.erf(xf * math.sqrt(0.5)))).to(x.dtype)


def relu_squared(x: Tensor) -> Tensor:
    return upcast(x).relu().square().to(x.dtype)


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    alpha: float | None = None,
    limit: float | None = None,
    layout: str = "halves",
) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1) if layout == "halves" else (gate[..., ::2], gate[..., 1::2])
    dtype = torch.promote_types(gate.dtype, up.dtype)
    g, u = upcast(gate), upcast(up)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    y = g * torch.sigmoid(g) * u if alpha is None else g * torch.sigmoid(alpha * g) * (u + 1)
    return y.to(dtype)


def _quick_gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel, arXiv 1606.08415, section 2: the sigmoid in place of Phi."""
    return x * torch.sigmoid(1.702 * x)


# beside GELU, by their names in `linear` and `GPTConfig`
ACTIVATIONS = {
    "relu": F.relu,
    "relu_squared": relu_squared,
    "silu": F.silu,
    "quick_gelu": _quick_gelu,
    "tanh": torch.tanh,
}


def dropout(x: Tensor, p: float, seed: int = 0, offset: int = 0, first_row: int = 0) -> Tensor:
    offset = rng.at_row("dropout", offset, first_row, math.prod(x.shape[1:-1]))
    return keep_scaled(upcast(x), rows_of(x), p, seed, offset).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, layout: str = "neox") -> Tensor:
    T, half = x.shape[2], cos.shape[1]
    tables = (t[:T] if positions is None else t[positions.long()] for t in (cos, sin))  # (T, half) or (B, T, half)
    xf = upcast(x)
    c, s = (t.to(xf.dtype).unsqueeze(-3) for t in tables)  # over the heads
    turned, rest = xf[..., : 2 * half], x[..., 2 * half :]
    if layout == "neox":
        a, b = turned.chunk(2, -1)
        y = torch.cat((a * c - b * s, b * c + a * s), -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        y = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    return torch.cat((y.to(x.dtype), rest), -1)


def embedding(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    x = F.embedding(ids, wte)  # B T C
    if wpe is None:
        return x
    if positions is None:
        positions = torch.arange(ids.shape[-1], device=ids.device)
    return (x + F.embedding(positions, wpe)).to(wte.dtype)
