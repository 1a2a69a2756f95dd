"""Codes of quantised weights in Triton: tables of values on a device, and codes turned into values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast import _mxfp4
from gptfast._nf4 import dynamic_values, nf4_values


def nf4_table(device: torch.device) -> Tensor:
    """(16,) float32, cached by device: kernels look values up in it, from the L1 cache.

    Raises:
        RuntimeError: this is the first call for the device, and a CUDA graph is being captured.
    """
    return _table("NF4", nf4_values, device)


def mxfp4_table(device: torch.device) -> Tensor:
    """(16,) float32; otherwise as `nf4_table`."""
    return _table("MXFP4", _mxfp4.values, device)


def code_table(format: str, device: torch.device) -> Tensor:
    """The table that `load_values` takes: any one for a format without."""
    return mxfp4_table(device) if format == "mxfp4" else nf4_table(device)


def dynamic_table(device: torch.device) -> Tensor:
    """(256,) float32, of double quantisation; otherwise as `nf4_table`."""
    return _table("double quantisation", dynamic_values, device)


_tables: dict[tuple[str, torch.device], Tensor] = {}


def _table(name: str, values: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
    """A table that outlives the call: what a capture allocates lies in the memory of its graph and is filled when that is
    replayed, and what inference mode makes is no operand of autograd."""
    if (name, device) not in _tables:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the table of {name} has not been made on {device}, and cannot be while a CUDA graph is captured: run the "
                "op once before the capture"
            )
        with torch.inference_mode(False):
            _tables[name, device] = values(device)
    return _tables[name, device]


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
        if FORMAT == "mxfp4":  # the first of a pair is in the low half
            return tl.load(table + tl.interleave(pairs & 15, pairs >> 4).to(tl.int32))
        elif FORMAT == "int4":
            return (unpack_pairs(pairs).to(tl.int32) - 8).to(tl.float32)
        else:
            return tl.load(table + unpack_pairs(pairs).to(tl.int32))


@triton.jit
def load_scales(scales, n, N, g, G, FORMAT: tl.constexpr):
    """(len(n),) float32: the scales of group g of outputs n; past the last output 0, or 2^-127."""
    scale = tl.load(scales + n.to(tl.int64) * G + g, n < N, other=0)
    if FORMAT == "mxfp4":  # 127 more than the exponent of two; 255 is nan
        bits = tl.where(scale == 0, 0x00400000, scale.to(tl.int32) << 23)
        return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)
