"""quantize_mxfp4, dequantize_mxfp4 and products with what they make: bits of transformers' reading and of a loop in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gptfast import ops

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def every_code_and_scale() -> tuple[Tensor, Tensor]:
    """Blocks of all 256 bytes for each scale but that of nan: (255, 16, 16) and (255, 16)."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(255, 16, 16)
    return codes.contiguous(), torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()


def test_numbers_are_those_of_transformers():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = every_code_and_scale()
    theirs = mxfp4.convert_moe_packed_tensors(blocks[None], scales[None]).transpose(1, 2)[0]
    ours = ops.dequantize_mxfp4(blocks, scales)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours.view(torch.int16), theirs.contiguous().view(torch.int16))
    flat = ops.dequantize_mxfp4(blocks.flatten(1), scales, dtype=torch.float32)
    assert torch.equal(flat, ours.float()), "bfloat16 holds every number"


def test_codes_and_scales_by_hand():
    """The low half comes first; a byte of 127 is 1, 255 no number."""
    codes = torch.tensor([[0x72, 0xF9] + [0] * 14], dtype=torch.uint8)
    x = ops.dequantize_mxfp4(codes, torch.tensor([[128]], dtype=torch.uint8))
    assert x[0, :5].tolist() == [2.0, 12.0, -1.0, -12.0, 0.0]
    assert ops.dequantize_mxfp4(codes, torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


def by_loop(block: list[float]) -> tuple[list[int], int]:
    """Section 6.3 of OCP Microscaling Formats 1.0, and e2m1 by rounding to nearest, halves to even."""
    largest = max(map(abs, block))
    exponent = max(-127, min(127, (math.frexp(largest)[1] - 1 if largest else -127) - 2))
    codes = []
    for x in block:
        size = abs(x) / 2.0**exponent
        code = min(range(8), key=lambda c: (abs(VALUES[c] - size), c % 2))
        codes.append(code | (8 if math.copysign(1, x) < 0 else 0))
    return codes, exponent + 127


def weights() -> Tensor:
    """float64: random ones of every size, all halves between levels and their neighbours, zeros, ends of the range."""
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:20] *= torch.logspace(-45, 37, 20, dtype=torch.float64)[:, None]
    halves = torch.tensor([(a + b) / 2 for a, b in pairwise(VALUES)], dtype=torch.float64)
    near = torch.cat([halves, halves.nextafter(halves + 1), halves.nextafter(halves - 1)])
    x[20, :21], x[20, 21:] = near, 6.0
    x[21] = -x[20] * 2.0**-30
    x[22], x[23] = 0.0, -0.0
    x[24, :] = 7.999
    x[25, 0], x[26, 0] = 3.3e38, -1e-42
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_a_loop_in_float64(dtype):
    x = weights()
    if dtype == torch.float16:
        x = x[20:25]
    x = x.to(dtype)
    codes, scales = ops.quantize_mxfp4(x)
    for n, block in enumerate(x.double().tolist()):
        expected, scale = by_loop(block)
        got = [half for byte in codes[n].tolist() for half in (byte & 15, byte >> 4)]
        assert (got, scales[n].item()) == (expected, scale), (n, block)


def test_numbers_in_mxfp4_keep_their_values():
    blocks, scales = every_code_and_scale()
    numbers = ops.dequantize_mxfp4(blocks, scales, dtype=torch.float32)[:253]  # larger ones overflow
    assert torch.equal(ops.dequantize_mxfp4(*ops.quantize_mxfp4(numbers), dtype=torch.float32), numbers)


def test_shapes():
    """Experts, a vector, short blocks, nothing; in pieces as in one."""
    x = torch.randn(3, 5, 70)
    codes, scales = ops.quantize_mxfp4(x)
    assert codes.shape == (3, 5, 48) and scales.shape == (3, 5, 3)
    assert torch.equal(codes[1, 2], ops.quantize_mxfp4(x[1, 2])[0])
    back = ops.dequantize_mxfp4(codes, scales, dtype=torch.float32)
    assert back.shape == (3, 5, 96) and (back[..., 70:] == 0).all()
    assert (back[..., :70] - x).abs().max() <= 2.0 ** (x.abs().max().log2().floor() - 1)  # 7.99 becomes 6
    for shape in [(0,), (0, 64), (4, 0), (2, 0, 33)]:
        empty = ops.quantize_mxfp4(torch.zeros(shape))
        assert ops.dequantize_mxfp4(*empty).shape == (*shape[:-1], -(-shape[-1] // 32) * 32)
    many = torch.randn(2**15 + 3, 32)
    assert torch.equal(ops.quantize_mxfp4(many)[0][-5:], ops.quantize_mxfp4(many[-5:])[0])
    assert all(t.is_meta for t in ops.quantize_mxfp4(torch.empty(3, 64, device="meta")))


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_products_of_bfloat16_round_nothing_but_their_sums(isa, rows):
    """Levels and scales are exact in bfloat16, so are products in float32: integers give integers, on every instruction set."""
    weight = torch.randint(-6, 7, (33, 96)).float()
    weight[weight.abs() == 5] = 4
    weight[:, ::32] = 6  # a scale of 1
    x = torch.randint(-8, 9, (rows, 96)).bfloat16()
    codes, scales = ops.quantize_mxfp4(weight)
    assert torch.equal(ops.dequantize_mxfp4(codes, scales).float(), weight)
    exact = x.double() @ weight.double().T  # below 2^24
    x.requires_grad_()
    y = ops.quantized_linear(x, codes, scales, format="mxfp4")
    assert torch.equal(y, exact.bfloat16())
    dy = torch.randint(-8, 9, (rows, 33)).bfloat16()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, (dy.double() @ weight.double()).bfloat16())
    scales = scales + torch.arange(-40, 26, 2, dtype=torch.int8)[:, None].to(torch.uint8)  # another power of two a row
    exact = x.detach().double() @ ops.dequantize_mxfp4(codes, scales, dtype=torch.float64).T
    assert torch.equal(ops.quantized_linear(x, codes, scales, format="mxfp4"), exact.bfloat16())


def test_a_scale_of_nan_is_nan(isa):
    codes, scales = ops.quantize_mxfp4(torch.randn(9, 64))
    scales[4, 1] = 255
    for rows in (1, 20):
        x = torch.randn(rows, 64, requires_grad=True)
        y = ops.quantized_linear(x, codes, scales, format="mxfp4")
        assert y[:, 4].isnan().all() and y[:, :4].isfinite().all() and y[:, 5:].isfinite().all()
        (dx,) = torch.autograd.grad(y[:, :9].sum(), x)
        assert dx[:, 32:].isnan().all() and dx[:, :32].isfinite().all()


CODES, SCALES = ops.quantize_mxfp4(torch.zeros(5, 64))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.quantize_mxfp4(torch.ones(3).int()), TypeError, "quantize_mxfp4: weight has dtype torch.int32"),
        (lambda: ops.quantize_mxfp4(torch.ones(3) / 0), ValueError, "quantize_mxfp4: weight holds inf or nan"),
        (lambda: ops.quantize_mxfp4(torch.ones(())), ValueError, r"quantize_mxfp4: weight has shape \(\); expected"),
        (lambda: ops.dequantize_mxfp4(CODES, SCALES.float()), TypeError, "scales has dtype torch.float32; expected"),
        (lambda: ops.dequantize_mxfp4(CODES.char(), SCALES), TypeError, "codes has dtype torch.int8; expected"),
        (
            lambda: ops.dequantize_mxfp4(CODES[:, 1:], SCALES),
            ValueError,
            r"codes has shape \(5, 31\) beside scales \(5, 2\); expected \(..., 16 G\)",
        ),
        (lambda: ops.dequantize_mxfp4(CODES, SCALES, dtype=torch.int8), TypeError, "dtype is torch.int8; expected"),
        (lambda: ops.dequantize_mxfp4(CODES.to("meta"), SCALES), ValueError, "all tensors must be on one device"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
