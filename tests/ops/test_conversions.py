"""float32 to bfloat16 and float16 and back, bit for bit as torch has it, on every instruction set and on the emulator.

A change that rounds ties the other way, or truncates, is a fraction of one unit in the last place: no tolerance shows it.
"""

from __future__ import annotations

import functools

import pytest
import torch

from gptfast import ops, rng
from gptfast.backend import cpu_isa
from tests.support import X86_PAIRS
from tests.support.op_properties import bitwise

HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
WIDTH = 1021  # of a row: whole vectors and a tail on every instruction set


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All 2^16, subnormal numbers, infinities and nan among them."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


@functools.cache
def sweep(dtype: torch.dtype) -> torch.Tensor:
    """What rounding to dtype can meet: every value, every tie between two neighbours, and the fp32 next to each tie."""
    values = patterns(dtype)[: 2**15]  # not below 0; infinity closes the finite ones, then nan
    finite = values[values.isfinite()].double()
    last = finite[-1:] * 2 - finite[-2:-1]  # where the next value would be: from half way on, infinity
    ties = ((finite + torch.cat([finite[1:], last])) / 2).float()
    beside = [torch.nextafter(ties, torch.full_like(ties, to)) for to in (0.0, float("inf"))]
    most = torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny, 1e-45, float("inf")])
    payloads = torch.tensor([0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    positive = torch.cat([values.float(), ties, *beside, most, payloads])
    return torch.cat([positive, -positive])


def rows(x: torch.Tensor) -> torch.Tensor:
    missing = -len(x) % WIDTH
    return torch.cat([x, torch.ones(missing, dtype=x.dtype)]).view(-1, WIDTH)


def widened(x: torch.Tensor) -> torch.Tensor:
    """x + -0.0 in float32, as the sum that add_layer_norm stores: every value as it is."""
    return ops.add_layer_norm(x, torch.full(x.shape, -0.0), torch.ones(WIDTH))[1]


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0.0 + x in dtype, as the gradient that add_layer_norm sends on to the residual."""
    residual = torch.zeros(x.shape, dtype=dtype, requires_grad=True)
    total = ops.add_layer_norm(torch.zeros_like(x), residual, torch.ones(WIDTH))[1]
    return torch.autograd.grad(total, residual, x)[0]


def not_subnormal(x: torch.Tensor) -> torch.Tensor:
    return ~(x.float().abs() < torch.finfo(torch.float32).tiny)


def check_conversions(dtype: torch.dtype, flushes: bool = False) -> None:
    halves, singles = rows(patterns(dtype)), rows(sweep(dtype))
    wide = widened(halves)
    assert wide.dtype == torch.float32 and bitwise(wide, halves.float())
    assert torch.equal(wide.signbit() | wide.isnan(), halves.float().signbit() | wide.isnan()), "the sign of 0"
    narrow, expected = narrowed(singles, dtype), (singles + 0.0).to(dtype)
    if flushes:
        expected = expected.where(not_subnormal(singles), 0.0)
    assert narrow.dtype == dtype
    wrong = (narrow != expected) & ~(narrow.isnan() & expected.isnan())
    assert not wrong.any(), f"{int(wrong.sum())}, such as {singles[wrong][0].item():g} to {narrow[wrong][0].item():g}"


@pytest.mark.parametrize("dtype", HALVES)
def test_bit_for_bit(dtype, isa):
    check_conversions(dtype, flushes=dtype == torch.bfloat16 and isa in X86_PAIRS)


@pytest.mark.parametrize("dtype", HALVES)
def test_bit_for_bit_on_cuda(dtype, emu):
    check_conversions(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_whole_rows_in_a_buffer(dtype, isa):
    """dropout converts a block of a row at a time: as it is, and times a factor that rounds."""
    x = patterns(dtype)
    x = rows(x[not_subnormal(x)] if isa in X86_PAIRS else x)
    same = ops.dropout(x, 0.0)
    assert bitwise(same, x) and torch.equal(same.signbit() | x.isnan(), x.signbit() | x.isnan())
    keep, scale = rng.dropout_keep((1, *x.shape), 0.3, 5, 0)[0], torch.tensor(rng.dropout_scale(0.3))
    assert bitwise(ops.dropout(x, 0.3, seed=5), torch.where(keep, (x.float() * scale).to(dtype), 0.0))


@pytest.mark.parametrize("by_columns", [False, True])
def test_products_of_pairs_round_their_factors(by_columns, isa):
    """With pairs=True float32 factors become bf16 first, where the instruction set multiplies such."""
    x = sweep(torch.bfloat16)
    x = x[(x == 0) | (x.isfinite() & (x.abs() >= torch.finfo(torch.bfloat16).tiny) & (x.abs() < 3e38))][:, None]
    rounded = x.bfloat16().float() if cpu_isa() in X86_PAIRS else x
    rounded = rounded.where(rounded.isfinite(), x)
    a = torch.cat([x, torch.zeros(len(x), 2)], 1)  # an odd number of columns
    a = a.t().contiguous().t() if by_columns else a
    out, one = torch.empty(len(x), 1), torch.tensor([[1.0], [0.0], [0.0]])
    torch.ops.gptfast.gemm(a, one, None, out, True, False, None)
    assert torch.equal(out, rounded)
