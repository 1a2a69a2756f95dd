"""quantized_linear and quantize_groups: parity, exact codes, input gradients through a frozen weight, compilation, errors.

On every instruction set of the CPU; tests/triton/test_triton.py runs it on the Triton kernels.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from gptfast import _nf4, ops
from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.testing import cases, check_case, dtypes
from gptfast.triton import INTERPRETING
from tests.support.op_properties import bitwise, check_no_double_backward, check_pure

CASES = cases("quantized_linear")


def quantized(N: int, K: int, format: str, size: int = 32, **options) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(N, K) * K**-0.5
    if format == "nf4":
        return ops.quantize_nf4(weight, block_size=size, **options).rows(N)
    if format == "mxfp4":
        return ops.quantize_mxfp4(weight)
    return ops.quantize_groups(weight, format, group_size=size, **options)


def test_which_backend_runs():
    assert resolve("quantized_linear", None, torch.ones(1)) == ("triton" if INTERPRETING else "cpu")
    assert resolve("quantized_linear", None, torch.ones(1, dtype=torch.float64)) == "eager"


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(isa, case, dtype):
    check_case(case, dtype)


@pytest.mark.parametrize(
    ("format", "size"), [*product(("int8", "int4", "nf4"), (32, 64, 128)), ("mxfp4", 32)], ids=lambda x: str(x)
)
def test_the_identity_reads_every_value(isa, format, size):
    """x = 1 gives back the weight, transposed and to the bit in float32: no code, scale or place is taken for another."""
    codes, scales = quantized(70, 256, format, size)
    weight = _nf4.dequantize_groups(codes, scales, format, size)
    options = {"format": format, "group_size": size}
    x = torch.eye(256, requires_grad=True)
    y = ops.quantized_linear(x, codes, scales, **options)
    assert torch.equal(y, weight.T)
    (dx,) = torch.autograd.grad(y, x, torch.eye(70).repeat(4, 1)[:256])
    assert torch.equal(dx[:70], weight)
    few = ops.quantized_linear(torch.eye(256)[100:109], codes, scales, **options)  # few rows: another tile, and splits
    assert torch.equal(few, weight.T[100:109])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("format", "levels"), [("int8", 127), ("int4", 8)])
def test_quantization_error(format, levels, scale_dtype):
    """At most half a step, and one for int4's missing +8."""
    weight = torch.randn(33, 100)
    weight[3] = 0
    codes, scales = ops.quantize_groups(weight, format, group_size=32, scale_dtype=scale_dtype)
    assert codes.shape == ((33, 128) if format == "int8" else (33, 64)) and scales.shape == (33, 4)
    back = _nf4.dequantize_groups(codes, scales, format, 32)
    step = scales.float().abs().repeat_interleave(32, 1)[:, :100]
    error = (back[:, :100] - weight).abs()
    slack = levels * step * torch.finfo(scale_dtype).eps  # of the scale's own rounding
    assert (error <= step * (0.5 if format == "int8" else 1) + slack).all()
    assert (error <= 0.5 * step + slack).float().mean() > 0.95
    assert (back[:, 100:] == 0).all() and (back[3] == 0).all()
    assert bitwise(
        _nf4.dequantize_groups(*ops.quantize_groups(back, format, scale_dtype=scale_dtype), format, 32), back
    )


def test_codes_of_a_known_weight():
    weight = torch.zeros(1, 32)
    weight[0, :5] = torch.tensor([-16.0, 14.0, 1.0, 2.0, -15.0])
    codes, scales = ops.quantize_groups(weight, "int4")
    assert scales.item() == 2.0  # -16 is -8
    assert codes[0, :3].tolist() == [0x0F, 0x89, 0x08]  # 8 + (-8, 7 | 0 (a half rounds to even), 1 | -8, 0)
    codes, scales = ops.quantize_groups(weight * 127 / 16, "int8")
    assert scales.item() == 1.0 and codes[0, :5].tolist() == [-127, 111, 8, 16, -119]


def test_nf4_rows_are_the_weight():
    nf4 = ops.quantize_nf4(torch.randn(6, 128), double=True)
    x = torch.randn(3, 128)
    expected = x @ ops.dequantize_nf4(*nf4, shape=(6, 128)).T
    y = ops.quantized_linear(x, *nf4.rows(6), format="nf4", group_size=64)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    twice = {"nested_absmax": nf4.nested_absmax, "offset": nf4.offset, "format": "nf4", "group_size": 64}
    for multiply in (ops.quantized_linear, reference.quantized_linear):
        y = multiply(x, nf4.codes.view(6, -1), nf4.absmax.view(6, -1), **twice)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("N", "K", "size"), [(70, 256, 32), (37, 192, 64), (3, 1152, 128)])
def test_doubly_quantized_scales(isa, N, K, size):
    """Every byte of a scale, in blocks of 256 that begin and end anywhere: the bits of the scales decoded, both ways."""
    codes, _ = quantized(N, K, "nf4", size)
    scales = (torch.randperm(N * K // size) % 256).to(torch.uint8).view(N, -1)
    nested, offset = torch.rand(-(-scales.numel() // 256)), torch.tensor(0.37)
    decoded = _nf4.nf4_absmax(scales, nested, offset).view(N, -1)
    for M, dtype in ((1, torch.bfloat16), (3, torch.float32), (20, torch.float32), (20, torch.bfloat16)):
        x = torch.randn(M, K).to(dtype).requires_grad_()
        options = {"format": "nf4", "group_size": size}
        y, wanted = (
            ops.quantized_linear(x, codes, of, **options, **extra)
            for of, extra in ((scales, {"nested_absmax": nested, "offset": offset}), (decoded, {}))
        )
        assert bitwise(y, wanted), (M, dtype)
        dy = torch.randn(M, N).to(dtype)
        (dx,), (dx_wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(wanted, x, dy)
        assert bitwise(dx, dx_wanted), (M, dtype)


@pytest.mark.parametrize(("K", "size"), [(40, 32), (1100, 128)])
def test_what_lies_beyond_is_not_read(isa, K, size):
    """A row with nan stays alone where rows end within a group; scales past the last, where splits are uneven."""
    codes, scales = quantized(5, K, "int8", size)
    scales = torch.cat([scales, torch.full_like(scales, float("nan"))])[:5]
    x = torch.randn(3, K)
    expected = reference.quantized_linear(x, codes, scales, group_size=size)
    x[1] = float("nan")
    y = ops.quantized_linear(x, codes, scales, group_size=size)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[::2], expected[::2], rtol=1e-4, atol=1e-5)


def test_leading_dimensions_and_autocast():
    codes, scales = quantized(5, 64, "int8")
    x = torch.randn(2, 3, 64)
    y = ops.quantized_linear(x, codes, scales)
    assert y.shape == (2, 3, 5)
    torch.testing.assert_close(ops.quantized_linear(x[0, 0], codes, scales), y[0, 0], rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.float16):
        half = ops.quantized_linear(x, codes, scales)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), y, rtol=2e-3, atol=2e-3)


def test_only_codes_are_kept_for_backward():
    """So that a model of 4 bits does not hold its weights in floats between forward and backward."""
    codes, scales = quantized(64, 64, "int4")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.quantized_linear(torch.randn(2, 64, requires_grad=True), codes, scales, format="int4")
    assert sorted(t.numel() for t in kept) == [128, 2048]


def test_pure():
    for case in CASES:
        check_pure(case, torch.float16)


def test_fp64_passes_gradcheck():
    codes, scales = quantized(5, 40, "int4")
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, b: ops.quantized_linear(x, codes, scales, b, format="int4"), (x, bias))


@pytest.mark.parametrize("double", [False, True])
def test_compiles(double):
    nf4 = ops.quantize_nf4(torch.randn(7, 64), block_size=32, double=double)
    codes, scales, nested = nf4.codes.view(7, 32), nf4.absmax.view(7, 2), nf4[2:]
    torch._dynamo.reset()

    def layer(x, bias):
        options = {"format": "nf4", "nested_absmax": nested[0], "offset": nested[1]}
        return ops.quantized_linear(x, codes, scales, bias, **options) * 2

    results = []
    for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x, bias = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(), torch.ones(7)
        bias.requires_grad_()
        y = f(x, bias)
        results.append((y, *torch.autograd.grad(y.sum(), (x, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_double_backward():
    codes, scales = quantized(4, 32, "int8")
    check_no_double_backward(
        lambda x: ops.quantized_linear(x, codes, scales) ** 2, torch.randn(2, 32), "quantized_linear: double backward"
    )


X, C8, S8 = torch.zeros(3, 40), torch.zeros(5, 64, dtype=torch.int8), torch.zeros(5, 2)
C4 = torch.zeros(5, 32, dtype=torch.uint8)
X4, S4, B4 = torch.zeros(3, 64), torch.zeros(5, 2), torch.zeros(5, 2, dtype=torch.uint8)
DOUBLE = {"format": "nf4", "nested_absmax": torch.zeros(1), "offset": torch.zeros(())}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.quantized_linear(X.int(), C8, S8), TypeError, "quantized_linear: x has dtype torch.int32"),
        (
            lambda: ops.quantized_linear(X, C8, S8, format="int3"),
            ValueError,
            "format is 'int3'; expected one of 'int8', 'int4', 'nf4', 'mxfp4'",
        ),
        (
            lambda: ops.quantized_linear(X, C8, S8, format="int4"),
            TypeError,
            "quantized_linear: codes has dtype torch.int8; format='int4' has torch.uint8",
        ),
        (
            lambda: ops.quantized_linear(X, C8, S8, group_size=48),
            ValueError,
            "quantized_linear: group_size is 48; expected a power of two from 32 to 128",
        ),
        (
            lambda: ops.quantized_linear(X, C8, S8, group_size=128),
            ValueError,
            r"codes has shape \(5, 64\); expected \(5, 128\) for 40 features in groups of 128 in int8 - was the weight",
        ),
        (
            lambda: ops.quantized_linear(X, C8, S8[:, :1]),
            ValueError,
            r"scales has shape \(5, 1\); expected \(5, 2\) for 40 features",
        ),
        (
            lambda: ops.quantized_linear(X, C4, S8, format="nf4"),
            ValueError,
            "x has 40 features; format='nf4' takes whole blocks of 32.* use dequantize_nf4 and linear",
        ),
        (
            lambda: ops.quantized_linear(X, C4, S8, format="mxfp4"),
            TypeError,
            "scales has dtype torch.float32; format='mxfp4' has torch.uint8, see quantize_mxfp4",
        ),
        (
            lambda: ops.quantized_linear(X, C4, S8.byte(), format="mxfp4", group_size=64),
            ValueError,
            "group_size is 64; format='mxfp4' has blocks of 32",
        ),
        (
            lambda: ops.quantized_linear(X, C4[:, :16], S8.byte(), format="mxfp4"),
            ValueError,
            r"codes has shape \(5, 16\); expected \(5, 32\) for 40 features in groups of 32 in mxfp4",
        ),
        (
            lambda: ops.quantized_linear(X, C4, S8.byte(), format="int4"),
            TypeError,
            "quantized_linear: scales has dtype torch.uint8; expected float32",
        ),
        (lambda: ops.quantized_linear(X[0, 0], C8, S8), ValueError, r"x has shape \(\), codes \(5, 64\); expected x"),
        (
            lambda: ops.quantized_linear(X, C8, S8, torch.zeros(4)),
            ValueError,
            r"bias has shape \(4,\); expected \(5,\)",
        ),
        (lambda: ops.quantized_linear(X, C8.to("meta"), S8), ValueError, "all tensors must be on one device"),
        (lambda: ops.quantized_linear(X4, C4, B4, [], **DOUBLE), TypeError, "bias is a list; expected a torch.Tensor"),
        # what the look at a glance must not let pass
        (lambda: ops.quantized_linear(X4.long(), C4, S4, format="nf4"), TypeError, "x has dtype torch.int64"),
        (lambda: ops.quantized_linear(X4, C4.char(), S4, format="nf4"), TypeError, "codes has dtype torch.int8"),
        (
            lambda: ops.quantized_linear(X4, C4, B4, format="nf4"),
            TypeError,
            "scales has dtype torch.uint8; expected fl",
        ),
        (
            lambda: ops.quantized_linear(X4, C4, S4[:4], format="nf4"),
            ValueError,
            r"scales has shape \(4, 2\); expected",
        ),
        (
            lambda: ops.quantized_linear(X4, C4[0], S4, format="nf4"),
            ValueError,
            r"codes \(32,\); expected x \(..., K\)",
        ),
        (lambda: ops.quantized_linear(X4[0, 0], C4, S4, format="nf4"), ValueError, r"x has shape \(\)"),
        (lambda: ops.quantized_linear(X4, C4, S4, format="nf4", group_size=16), ValueError, "group_size is 16"),
        (
            lambda: ops.quantized_linear(X4, C4, S4.to_sparse(), format="nf4"),
            TypeError,
            "scales has layout torch.sparse",
        ),
        (
            lambda: ops.quantized_linear(X4, C4, S4.to("meta"), format="nf4"),
            ValueError,
            "all tensors must be on one dev",
        ),
        (lambda: ops.quantized_linear(X4, C4, S4, torch.zeros(4), format="nf4"), ValueError, "bias has shape"),
        (lambda: ops.quantized_linear(X4, C4, S4, X4[0].int(), format="nf4"), TypeError, "bias has dtype torch.int32"),
        (
            lambda: ops.quantized_linear(X4, C4.tolist(), S4, format="nf4"),
            TypeError,
            "codes is a list; expected a torch",
        ),
        # doubly quantised scales
        (
            lambda: ops.quantized_linear(X4, C4, S4, **DOUBLE),
            TypeError,
            "format='nf4' with nested_absmax has torch.uint8",
        ),
        (
            lambda: ops.quantized_linear(X4, C4, B4, **DOUBLE | {"format": "int4"}),
            ValueError,
            "nested_absmax and offset with format='int4'; nested_absmax and offset go together, with format='nf4'",
        ),
        (
            lambda: ops.quantized_linear(X4, C4, B4, **DOUBLE | {"offset": None}),
            ValueError,
            "quantized_linear: nested_absmax with format='nf4'; nested_absmax and offset go together",
        ),
        (
            lambda: ops.quantized_linear(X4, C4, B4, **DOUBLE | {"offset": torch.zeros(2)}),
            ValueError,
            r"offset has shape \(2,\); expected \(\) for 64 features",
        ),
        (
            lambda: ops.quantized_linear(X4, C4, B4, **DOUBLE | {"nested_absmax": torch.zeros(2)}),
            ValueError,
            r"nested_absmax has shape \(2,\); expected \(1,\) for 64 features",
        ),
        (
            lambda: ops.quantized_linear(X4, C4, B4, **DOUBLE | {"offset": torch.zeros((), dtype=torch.float64)}),
            TypeError,
            "offset has dtype torch.float64; expected torch.float32",
        ),
        (lambda: ops.quantize_groups(X, "nf4"), ValueError, "quantize_groups: format is 'nf4'; expected one of 'int8'"),
        (
            lambda: ops.quantize_groups(X, group_size=16),
            ValueError,
            "quantize_groups: group_size is 16; expected a power",
        ),
        (lambda: ops.quantize_groups(X[0]), ValueError, r"quantize_groups: weight has shape \(40,\); expected \(out"),
        (lambda: ops.quantize_groups(X / 0), ValueError, "quantize_groups: weight holds inf or nan"),
        (
            lambda: ops.quantize_groups(X + 1e8),
            ValueError,
            "a scale is beyond torch.float16; use scale_dtype=torch.float32",
        ),
        (
            lambda: ops.quantize_groups(X, scale_dtype=torch.bfloat16),
            ValueError,
            "scale_dtype is torch.bfloat16; expected",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
