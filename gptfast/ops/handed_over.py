"""Calls of causal_attention that `auto` hands to torch's scaled_dot_product_attention, where that measured faster.

Only calls that mean the same there, bit-level promises included: without gradients, as torch's backward does not repeat bit
for bit; without dropout, whose masks are ours; without lengths, window or lse. `make bench-gpu` prints the shapes.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# (part of the GPU's name, head dim) -> query lengths, bfloat16 and float16. Empty until measured: our kernel runs.
FASTER: dict[tuple[str, int], range] = {}


def takes(q: Tensor, k: Tensor, v: Tensor, causal: bool, plain: bool) -> bool:
    """Whether torch runs this call; `plain`: it has no dropout, lengths or window, and wants no lse."""
    if not FASTER or not plain or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    if causal and q.shape[2] != k.shape[2]:  # torch aligns the mask to the first key
        return False
    name = gpu_name(q.device)
    return any(gpu in name and q.shape[3] == D and q.shape[2] in lengths for (gpu, D), lengths in FASTER.items())


def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> Tensor:
    """(B, H, T, D), stored as (B, T, H, D)."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@functools.cache
def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
