"""Rotary positions: the tables of their angles, and queries and keys rotated by them.

B rows, T positions, H heads, D head_dim, P block_size, R channels of a head that are rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gptfast import ops
from gptfast._rope import RopeScaling

if TYPE_CHECKING:
    from gptfast.config import GPTConfig


ROTARY_TABLES = ("rotary.cos", "rotary.sin")  # names of the buffers of a GPT, which are computed and not stored


class Rotation(NamedTuple):
    """How the queries and keys of a forward are rotated.

    cos, sin: (P, R / 2) fp32.  layout: see `gptfast.ops.rotary`.
    positions: (T,) or (B, T) int64, numbers of the positions; None: from 0 on.
    """

    cos: Tensor
    sin: Tensor
    layout: str
    positions: Tensor | None = None

    @classmethod
    def of(cls, config: GPTConfig, T: int, device: torch.device) -> Rotation:
        """Those of positions 0 to T - 1."""
        cos, sin = (table.to(device) for table in rotary_tables(config, T))
        return cls(cos, sin, layout_of(config))

    def rotate(self, x: Tensor) -> Tensor:
        """x (B, H, T, D), rotated."""
        return ops.rotary(x, self.cos, self.sin, positions=self.positions, layout=self.layout)


class RotaryEmbedding(torch.nn.Module):
    """Tables of cos and sin, in fp32 whatever the dtype of the model: buffers that checkpoints leave out.

    Args:
        config: uses block_size, head_dim and the fields of rotary positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layout = layout_of(config)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, positions: Tensor | None = None) -> Rotation:
        """The rotation of a forward. positions: None, (T,) or (B, T), packed texts as (1, T)."""
        return Rotation(self.cos, self.sin, self.layout, positions)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        tables = self.cos, self.sin
        super()._apply(fn, recurse)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            moved = getattr(self, name)
            if moved.dtype != table.dtype:
                setattr(self, name, table.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"{len(self.cos)} positions, {2 * self.cos.shape[1]} channels, {self.layout}"


def layout_of(config: GPTConfig) -> str:
    """The pairs of channels, as `gptfast.ops.rotary` calls them."""
    return "interleaved" if config.rotary_layout == "interleaved" else "neox"


def rotary_tables(config: GPTConfig, n: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 to n - 1, (n, R / 2) fp32 each. n: None: block_size."""
    n, scaling = config.block_size if n is None else n, RopeScaling.of(config.rope_scaling)
    told = None if scaling is None else scaling.to_dict()
    cos, sin = ops.rotary_tables(n, config.rotary_dim, config.rope_theta, told)
    return cos, -sin if config.rotary_layout == "reversed" else sin  # rotation by the negative angle
