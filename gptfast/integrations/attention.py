"""Attention for transformers' models: `attn_implementation="gptfast"`, and what a patched attention module calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.integrations.masks import Pattern, pattern_of

REFUSED = {  # argument of transformers' interface: what it is
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
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
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface has it.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        query: (B, H, T, D).  key, value: (B, Hk, S, D), H a multiple of Hk.
        attention_mask: None; or (B, 1, T, S), bool or float. Padding on either side, packed documents and windows run in
            the kernel, all else in `F.scaled_dot_product_attention`.
        dropout: probability of dropping an attention weight; the mask follows `torch.manual_seed`.
        scaling: of the scores; None: D ** -0.5.
    Returns:
        (B, T, H, D), None.
    Raises:
        NotImplementedError: a soft cap, sinks or another change of the scores.
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
    options = {"dropout_p": dropout, "softmax_scale": scaling}
    if attention_mask is None and (T == S or not causal or T == 1):
        out = _attend(query, key, value, causal=causal and T == S, **options)
        return out.transpose(1, 2), None
    if attention_mask is None or torch.compiler.is_compiling():
        return _by_torch(query, key, value, attention_mask, causal, options), None
    attention_mask = attention_mask[..., :S]
    pattern = pattern_of(attention_mask) if T == S else None
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
    the mean of the values under one of floats, whose least value swallows the scores."""
    B, _, T, _ = query.shape
    if pattern.cu_seqlens is not None:
        one = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value)]  # 1 H BT D
        out = _attend(*one, cu_seqlens=pattern.cu_seqlens, **options)
        return out.transpose(1, 2).reshape(B, T, *out.shape[1::2])
    options = {**options, "window": pattern.window, "seq_lens": pattern.lengths}
    if pattern.shift is None:
        return _attend(query, key, value, **options).transpose(1, 2)
    # padding on the left goes to the right: every row is turned by it, and the result turned back
    places = torch.arange(T, device=query.device)
    index = ((places + pattern.shift[:, None]) % T)[:, None, :, None]
    turned = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (query, key, value)]
    out = _attend(*turned, **options)
    back = ((places - pattern.shift[:, None]) % T)[:, None, :, None]
    out = out.gather(2, back.expand_as(out))
    blind = (places < pattern.shift[:, None])[:, None, :, None]
    if zeros:
        return out.masked_fill(blind, 0).transpose(1, 2)
    mean = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
    return torch.where(blind, mean, out).transpose(1, 2)


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: dict[str, Any]
) -> Tensor:
    """`F.scaled_dot_product_attention` with any mask; (B, T, H, D)."""
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
