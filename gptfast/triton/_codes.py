"""Codes of quantised weights in Triton: tables of values on a device, and codes turned into values."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast._nf4 import dynamic_values, nf4_values


@functools.cache
def nf4_table(device: torch.device) -> Tensor:
    """(16,) float32, cached by device: kernels look values up in it, from the L1 cache."""
    return nf4_values(device)


@functools.cache
def dynamic_table(device: torch.device) -> Tensor:
    return dynamic_values(device)


@triton.jit
def unpack_pairs(pairs):
    """(..., n) bytes -> (..., 2 n) codes: the first of a pair is in the high half."""
    return tl.interleave(pairs >> 4, pairs & 15)


@triton.jit
def load_values(codes, table, n, N, k0, row_bytes, FORMAT: tl.constexpr, WIDTH: tl.constexpr):
    """(len(n), WIDTH) float32: the unscaled values of the codes of outputs n, from input k0 on, which is even;
    past the last output any finite values."""
    row = codes + n.to(tl.int64)[:, None] * row_bytes
    inside = (n < N)[:, None]
    if FORMAT == "int8":
        return tl.load(row + k0 + tl.arange(0, WIDTH)[None, :], inside, other=0).to(tl.float32)
    else:
        pairs = tl.load(row + k0 // 2 + tl.arange(0, WIDTH // 2)[None, :], inside, other=0)
        code = unpack_pairs(pairs).to(tl.int32)
        if FORMAT == "int4":
            return (code - 8).to(tl.float32)
        else:
            return tl.load(table + code)
