"""Fixed position embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(block_size: int, n_embd: int, device: torch.device | None = None) -> Tensor:
    """PE[t, 2i] = sin(t / 10000^(2i / C)), PE[t, 2i + 1] = cos of the same (Vaswani et al., arXiv 1706.03762,
    3.5).

    Args:
        block_size: number of positions T.
        n_embd: C, may be odd.
        device: where; None: torch's default device, as for a new module.
    Returns:
        (T, C) fp32, computed in fp64.
    """
    even = torch.arange(0, n_embd, 2, dtype=torch.float64, device=device)  # 2i
    t = torch.arange(block_size, dtype=torch.float64, device=device)[:, None]
    angle = t * torch.exp(-math.log(10000.0) * even / n_embd)  # T ceil(C / 2)
    table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
    return table[:, :n_embd].float()


class SinusoidalEmbedding(torch.nn.Module):
    """Sinusoids in the place of learned positions: `weight` is a buffer that checkpoints leave out."""

    weight: Tensor

    def __init__(self, block_size: int, n_embd: int) -> None:
        super().__init__()
        self.register_buffer("weight", sinusoids(block_size, n_embd), persistent=False)
