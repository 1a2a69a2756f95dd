"""Attention in eager PyTorch, with everything that a query may not see."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import rng
from gptfast._schemas import AttentionOptions
from gptfast.backend import has_values
from gptfast.ops.reference._numbers import keep_scaled, upcast


def visible_keys(T: int, S: int, options: AttentionOptions, device: torch.device | str = "cpu") -> Tensor:
    """bool (B or 1, 1, T, S): may query i see key j?  Causal: j <= i + S - T; window w: also j > i + S - T - w."""
    last = torch.arange(T, device=device)[:, None] + (S - T)
    j = torch.arange(S, device=device)[None, :]
    visible = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    if options.causal:
        visible = visible & (j <= last)
    if options.window:
        visible = visible & (j > last - options.window)
    if (cu_seqlens := options.cu_seqlens) is not None:  # packed documents: query and key must lie in the same one
        document = torch.searchsorted(cu_seqlens.contiguous(), torch.arange(T, device=device), right=True)
        inside = document < len(cu_seqlens)
        visible = visible & (document[:, None] == document[None, :]) & inside[:, None]
    if options.seq_lens is not None:
        visible = visible & (j < options.seq_lens[:, None, None, None])
    if options.left_pad is not None:
        visible = visible & (j >= options.left_pad[:, None, None, None])
    return visible


def _masked_product(equation: str, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """einsum of `a` with the keys or values x (B, H, S, D) that each query sees, without 0 * nan from the others.

    It needs (B, H, T, S, D) of memory, so it is for inputs with inf or nan only.
    """
    return torch.einsum(equation, a, torch.where(mask[..., None], x[:, :, None], 0.0))


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    left_pad: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    enable_gqa: bool = False,
    first_row: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    offset = rng.at_row("causal_attention", offset, first_row, q.shape[1])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = AttentionOptions(seq_lens, cu_seqlens, causal, scale, dropout_p, seed, offset, window or 0)
    options = options._replace(left_pad=left_pad, sinks=sinks, softcap=softcap or 0.0)
    return attention(q, k, v, options, return_lse)


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_attention, with its options in one object. Queries of heads that share keys lie in one matrix, head after head:
    k and v (B, K, S, D) are not repeated."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    rows = H * T // K if K else T
    mask = visible_keys(T, S, options, q.device)
    qf, kf, vf = upcast(q).reshape(B, K, rows, D), upcast(k), upcast(v)
    leaky = has_values(kf) and not (torch.isfinite(kf).all() and torch.isfinite(vf).all())
    seen = mask.repeat(1, 1, H // K, 1) if leaky else mask  # of the rows of a key head
    scores = _masked_product("bhtd,bhtsd->bhts", qf, kf, seen) if leaky else qf @ kf.transpose(-1, -2)
    scores = scores.reshape(B, H, T, S) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))  # B H T S
    if options.sinks is not None:  # as the score of one more key, whose value is 0
        column = options.sinks.to(scores.dtype)[None, :, None, None].expand(B, H, T, 1)
        scores = torch.cat([scores, column], -1)
    empty = scores.isneginf().all(-1, keepdim=True)  # B H T 1: no key is visible
    probs = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., :S]
    probs = keep_scaled(probs, (B * H, T, S), options.dropout_p, options.seed, options.offset, True)
    probs = probs.reshape(B, K, rows, S)
    out = (_masked_product("bhts,bhtsd->bhtd", probs, vf, seen) if leaky else probs @ vf).reshape(B, H, T, D)
    return (out.to(q.dtype), scores.detach().logsumexp(-1)) if return_lse else out.to(q.dtype)
