"""Attention for transformers' models: `attn_implementation="gptfast"`, and what a patched attention module calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.integrations.masks import Pattern, pattern_of

REFUSED = {  # argument of transformers' interface: what it is
    "position_bias": "a bias on the scores",
    "alibi": "a bias on the scores",
    "head_mask": "a mask of heads",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface has it.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        query: (B, H, T, D).  key, value: (B, Hk, S, D), H a multiple of Hk.
        attention_mask: None; or (B, 1, T, S), bool or float. Padding on either side, packed documents and windows run in
            the kernel, all else in `F.scaled_dot_product_attention`, or written out where that has no such scores.
        dropout: probability of dropping an attention weight; the mask follows `torch.manual_seed`.
        scaling: of the scores; None: D ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2.
        s_aux: (H,), the attention sinks of gpt-oss: one more logit in the softmax of each head.
    Returns:
        (B, T, H, D), None.
    Raises:
        NotImplementedError: another change of the scores.
    """
    for name, what in REFUSED.items():
        if others.get(name) is not None:
            raise NotImplementedError(
                f"attn_implementation='gptfast': {name}, {what}, is not supported; use attn_implementation='eager'"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    T, S = query.shape[2], key.shape[2]
    if (
        attention_mask is None and causal and T > 1 and S > T
    ):  # the first fill of a static cache: what is behind is empty
        key, value, S = key[:, :, :T], value[:, :, :T], T
    options = {"dropout_p": dropout, "softmax_scale": scaling, "softcap": softcap, "sinks": s_aux}
    if attention_mask is None and (T == S or not causal or T == 1):
        out = _attend(query, key, value, causal=causal and T == S, **options)
        return out.transpose(1, 2), None
    if attention_mask is None or torch.compiler.is_compiling():
        return _by_torch(query, key, value, attention_mask, causal, options), None
    attention_mask = attention_mask[..., :S]
    changed = softcap is not None or s_aux is not None  # steps with a cache run in torch's attention where that can
    pattern = pattern_of(attention_mask) if T == S or changed else None
    if pattern is None:
        return _by_torch(query, key, value, attention_mask, causal, options), None
    zeros = attention_mask.dtype == torch.bool
    return _by_pattern(query, key, value, pattern, options, zeros), None


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return ops.causal_attention(query, key, value, enable_gqa=True, **options)


def _by_pattern(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, options: dict[str, Any], zeros: bool
) -> Tensor:
    """(B, T, H, D). Queries that are padding on the left see nothing: as in torch their result is 0 under a mask of bools, and
    the mean of the values under one of floats, whose least value swallows the scores; a sink takes all of the weight."""
    B, _, T, _ = query.shape
    if pattern.cu_seqlens is not None:
        one = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value)]  # 1 H BT D
        out = _attend(*one, cu_seqlens=pattern.cu_seqlens, **options)
        return out.transpose(1, 2).reshape(B, T, *out.shape[1::2])
    seen = {"causal": pattern.causal, "window": pattern.window}
    for name in ("left_pad", "seq_lens"):  # of one row where all have the same mask
        of_rows = getattr(pattern, name)
        seen[name] = None if of_rows is None else of_rows.expand(B)
    out = _attend(query, key, value, **seen, **options).transpose(1, 2)
    if zeros or not pattern.causal or pattern.left_pad is None or options["sinks"] is not None:
        return out
    blind = torch.arange(T, device=query.device) < pattern.left_pad[:, None]
    mean = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
    return torch.where(blind[:, :, None, None], mean.transpose(1, 2), out)


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: dict[str, Any]
) -> Tensor:
    """`F.scaled_dot_product_attention` with any mask; (B, T, H, D)."""
    if options["softcap"] is not None or options["sinks"] is not None:
        return _written_out(query, key, value, mask, causal, **options)
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options["dropout_p"],
        scale=options["softmax_scale"],
        is_causal=mask is None and causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As transformers' eager attention computes soft caps and sinks, which torch's has not; (B, T, H, D)."""
    T, S, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., :S].to(query.dtype)
    return (nn.functional.dropout(weights, dropout_p) @ value).transpose(1, 2)
