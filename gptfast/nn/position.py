"""Fixed position embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POSITIONS = 4096  # whose sinusoids are held in fp64


def sinusoids(block_size: int, n_embd: int, device: torch.device | None = None) -> Tensor:
    """PE[t, 2i] = sin(t / 10000^(2i / C)), PE[t, 2i + 1] = cos of the same (Vaswani et al., arXiv 1706.03762,
    3.5).

    Args:
        block_size: number of positions T.
        n_embd: C, may be odd.
        device: where; None: torch's default device, as for a new module.
    Returns:
        (T, C) fp32, computed in fp64, some positions at a time.
    """
    even = torch.arange(0, n_embd, 2, dtype=torch.float64, device=device)  # 2i
    frequencies = torch.exp(-math.log(10000.0) * even / n_embd)
    table = torch.empty(block_size, n_embd, dtype=torch.float32, device=device)
    for first in range(0, block_size, POSITIONS):
        part = table[first : first + POSITIONS]
        t = torch.arange(first, first + len(part), dtype=torch.float64, device=device)[:, None]
        angle = t * frequencies  # positions, ceil(C / 2)
        part.copy_(torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :n_embd])
    return table


class SinusoidalEmbedding(torch.nn.Module):
    """Sinusoids in the place of learned positions: `weight` is a buffer that checkpoints leave out."""

    weight: Tensor

    def __init__(self, block_size: int, n_embd: int) -> None:
        super().__init__()
        self.register_buffer("weight", sinusoids(block_size, n_embd), persistent=False)
