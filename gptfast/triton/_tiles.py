"""Tiles of matrix products: their sizes, and what the tensor cores multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from gptfast.triton import INTERPRETING


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of a tile, warps, stages of the loads' pipeline, and whether tiles are loaded by TMA."""

    m: int
    n: int
    warps: int
    stages: int
    tma: bool = False

    def options(self) -> dict[str, int]:
        """The arguments of a kernel that these are."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "num_warps": self.warps, "num_stages": self.stages}


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """What the tensor cores multiply: the inputs' dtype, but float32 for bfloat16 in the interpreter, whose bfloat16 is wrong."""
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRETING else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
