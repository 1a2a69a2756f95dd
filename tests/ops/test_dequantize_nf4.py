"""dequantize_nf4 and quantize_nf4: bits, the layout of bitsandbytes, error of quantisation, compilation, errors.

Without TRITON_INTERPRET this is the plain PyTorch that serves CPUs; tests/triton/test_triton.py runs it on the Triton kernel.
"""

from __future__ import annotations

import pytest
import torch

from gptfast import _nf4, ops
from gptfast._nf4 import NF4_VALUES, dynamic_values
from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.testing import cases, check_case
from gptfast.triton import INTERPRETING

CASES = cases("dequantize_nf4")
BNB_CODES = (
    "7778888877655555678abbbba8643323357acddddb8532111247bdeffec95210"
    "22357acdddcb8632112357aceeedb8531111247bdefeec9521001248cefffec930"
)
BNB_ABSMAX = [1.5252763032913208, 3.0721452236175537, 1.837201476097107]
BNB_NESTED_CODES, BNB_NESTED_ABSMAX, BNB_OFFSET = [23, 255, 47], [0.9272708892822266], 2.144874334335327


def test_which_backend_runs():
    assert resolve("dequantize_nf4", None, torch.ones(1)) == ("triton" if INTERPRETING else "eager")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case):
    check_case(case, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_bits_are_the_references(case):
    args = case.inputs(torch.float32)
    for dtype in (torch.float32, torch.float16):
        options = {**case.options, "dtype": dtype}
        assert torch.equal(ops.dequantize_nf4(*args, **options), reference.dequantize_nf4(*args, **options))


def test_every_value_and_pair():
    """All 256 bytes, by a scale that rounds nothing: the first value of a pair is in the high half."""
    codes = torch.arange(256, dtype=torch.uint8)
    got = ops.dequantize_nf4(codes, torch.full((8,), 2.0), shape=(256, 2))
    values = 2 * torch.tensor(NF4_VALUES)
    assert torch.equal(got, torch.stack([values.repeat_interleave(16), values.repeat(16)], -1))


def test_the_layout_of_bitsandbytes():
    """The codes and scales that bitsandbytes 0.50.2 made on a CPU, functional.quantize_4bit(x, blocksize=64,
    quant_type="nf4", compress_statistics=True), of x = sin(0.37 i) i / 40."""
    i = torch.arange(130, dtype=torch.float64)
    x = (torch.sin(0.37 * i) * i / 40).float()
    assert bytes(ops.quantize_nf4(x).codes.tolist()).hex() == BNB_CODES
    torch.testing.assert_close(ops.quantize_nf4(x).absmax, torch.tensor(BNB_ABSMAX), rtol=0, atol=0)
    double = ops.quantize_nf4(x, double=True)
    assert double.absmax.tolist() == BNB_NESTED_CODES
    torch.testing.assert_close(double.nested_absmax, torch.tensor(BNB_NESTED_ABSMAX), rtol=1e-6, atol=0)
    torch.testing.assert_close(double.offset, torch.tensor(BNB_OFFSET), rtol=1e-6, atol=0)


def test_dynamic_values():
    values = dynamic_values()
    assert len(values) == 256 and values.diff().gt(0).all() and values[-1] == 1 and (values == 0).sum() == 1
    assert torch.equal(values[128:-1], -values[:127].flip(0)), "the same on both sides of 0, and 1"


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [16, 64, 1024])
def test_quantization_error(block_size, double):
    """No code is nearer than the one that was taken; double quantisation moves scales by under 1%."""
    weight = torch.randn(50, 67)
    weight[:2] = 0
    nf4 = ops.quantize_nf4(weight, block_size=block_size, double=double)
    scales = _nf4.nf4_absmax(*nf4[1:])
    single = ops.quantize_nf4(weight, block_size=block_size).absmax
    if double:
        torch.testing.assert_close(scales, single, rtol=0, atol=0.02 * (single - single.mean()).abs().max().item())
    scale = single.repeat_interleave(block_size)[: weight.numel(), None]
    best = (scale * torch.tensor(NF4_VALUES) - weight.flatten()[:, None]).abs().min(1).values
    back = ops.dequantize_nf4(
        *ops.quantize_nf4(weight, block_size=block_size), shape=weight.shape, block_size=block_size
    )
    error = (back - weight).abs().flatten()
    torch.testing.assert_close(error, best, rtol=1e-5, atol=1e-6)
    assert (back[:2] == 0).all()


def test_fp64_is_eagers():
    nf4 = ops.quantize_nf4(torch.randn(5, 5))
    assert ops.dequantize_nf4(*nf4, shape=(5, 5), dtype=torch.float64).dtype == torch.float64


def test_compiles():
    nf4 = ops.quantize_nf4(torch.randn(6, 20), double=True)

    def weight() -> torch.Tensor:
        return ops.dequantize_nf4(*nf4, shape=(6, 20), dtype=torch.float16) * 2

    torch._dynamo.reset()
    assert torch.equal(torch.compile(weight, fullgraph=True, backend="aot_eager")(), weight())


Q = ops.quantize_nf4(torch.ones(10, 10))
D = ops.quantize_nf4(torch.ones(10, 10), double=True)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.quantize_nf4(torch.ones(3).int()), TypeError, "quantize_nf4: weight has dtype torch.int32"),
        (lambda: ops.quantize_nf4(torch.ones(3) / 0), ValueError, "quantize_nf4: weight holds inf or nan"),
        (
            lambda: ops.quantize_nf4(torch.ones(3), block_size=65),
            ValueError,
            "block_size is 65; expected a power of two",
        ),
        (
            lambda: ops.dequantize_nf4(*Q, shape=(10, 11)),
            ValueError,
            r"dequantize_nf4: codes has 50 values; expected 55 for shape \(10, 11\) and block_size 64",
        ),
        (
            lambda: ops.dequantize_nf4(*Q, shape=(10, 10), block_size=32),
            ValueError,
            "dequantize_nf4: absmax has 2 values; expected 4",
        ),
        (
            lambda: ops.dequantize_nf4(Q.codes, Q.absmax.half(), shape=(10, 10)),
            TypeError,
            "absmax has dtype torch.float16; expected torch.float32",
        ),
        (
            lambda: ops.dequantize_nf4(D.codes, Q.absmax, *D[2:], shape=(10, 10)),
            TypeError,
            "absmax has dtype torch.float32; expected torch.uint8",
        ),
        (
            lambda: ops.dequantize_nf4(*D[:3], shape=(10, 10)),
            ValueError,
            "nested_absmax and offset go together; got one of them",
        ),
        (
            lambda: ops.dequantize_nf4(*Q, shape=(100,), dtype=torch.int8),
            TypeError,
            "dtype is torch.int8; expected float32",
        ),
        (
            lambda: ops.dequantize_nf4(Q.codes.to("meta"), Q.absmax, shape=(100,)),
            ValueError,
            "all tensors must be on one device",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
