"""Padding of a batch: what an attention mask says in the words of `causal_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.backend import has_values
from gptfast.ops._attention_checks import trusted
from gptfast.ops._checks import check_dense


def real_keys(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real keys of each row of an attention mask, as `causal_attention` takes them: left_pad[b] <= j < seq_lens[b].

    Args:
        attention_mask: (B, S), bool or number: not 0 at tokens, 0 at padding on the left, on the right or on both sides.
    Returns:
        left_pad, seq_lens: (B,) int64 on the mask's device; both 0 for a row of padding alone.
    Raises:
        TypeError, ValueError: no tensor (B, S); a row with padding between its tokens. torch.compile does not look for it.
    """
    mask = check_dense("real_keys", "attention_mask", attention_mask)
    if mask.dim() != 2:
        raise ValueError(f"real_keys: attention_mask has shape {tuple(mask.shape)}; expected (B, S)")
    S, real = mask.shape[1], (mask != 0).to(torch.uint8)
    if S == 0:
        none = torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device)
        return trusted(none), trusted(none.clone())
    count = real.sum(1, dtype=torch.int64)
    left = torch.where(count > 0, real.argmax(1), 0)
    end = torch.where(count > 0, S - real.flip(1).argmax(1), 0)
    if not torch.compiler.is_compiling() and has_values(mask):
        holes = (end - left != count).nonzero()
        if len(holes):
            raise ValueError(
                f"real_keys: row {int(holes[0])} of attention_mask has padding between its tokens; expected it at the ends "
                "- pack the texts and use cu_seqlens"
            )
    return trusted(left), trusted(end)
