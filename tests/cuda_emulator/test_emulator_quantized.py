"""quantized_linear's CUDA kernels on the emulator against float64: every format, dtype, number of rows and kernel, both ways."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from gptfast import _nf4, ops
from tests.support import emulated
from tests.support.op_properties import bitwise

pytestmark = pytest.mark.usefixtures("emu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["int8", "int4", "nf4", "mxfp4"]
SIZES = {"mxfp4": 32}  # of a group; of others any
ROWS = [1, 2, 5, 8, 9, 33, 130]  # a set of rows, several, blocks of rows, tiles of rows


def packed(N: int, K: int, format: str, size: int, **options) -> tuple[Tensor, Tensor]:
    weight = torch.randn(N, K) * K**-0.5
    if format == "nf4":
        return ops.quantize_nf4(weight, block_size=size).rows(N)
    if format == "mxfp4":
        return ops.quantize_mxfp4(weight)
    return ops.quantize_groups(weight, format, group_size=size, **options)


def forward(x: Tensor, weight: tuple[Tensor, Tensor], format: str, size: int, bias: Tensor | None = None) -> Tensor:
    return torch.ops.gptfast_emu.quantized_linear_fwd(x, *weight, bias, format, size)


def gradient(dy: Tensor, weight: tuple[Tensor, Tensor], format: str, size: int, K: int) -> Tensor:
    return torch.ops.gptfast_emu.quantized_linear_bwd(dy, *weight, format, size, K)


def check(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | float = 0.0) -> None:
    """got = x w + bias, of which weights, and the result, are rounded to x's dtype, and sums are of float32."""
    exact, scale = x.double() @ w + bias, x.double().abs() @ w.abs()
    unit = torch.finfo(x.dtype).eps / 2
    allowed = unit * (scale * (4 if x.dtype == torch.float32 else 1) + exact.abs()) + 2e-6 * scale
    allowed += 2**-25 * x.double().abs().sum(-1, keepdim=True)  # float16 rounds what is below 2**-14 to steps of 2**-24
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("format", "size"), [*product(FORMATS[:3], (32, 64, 128)), ("mxfp4", 32)], ids=lambda x: str(x)
)
def test_products(format, size, rows, dtype):
    """Ragged in every direction; rows of codes for one warp, for some and for more than there are."""
    N, K = {1: (40, 128), 2: (3, 2432), 5: (17, 640), 8: (137, 384), 9: (16, 256), 33: (70, 200), 130: (141, 100)}[rows]
    K = -(-K // size) * size if format == "nf4" else K
    weight = packed(N, K, format, size)
    w = _nf4.dequantize_groups(*weight, format, size)[:, :K].double()
    x, dy, bias = torch.randn(rows, K).to(dtype), torch.randn(rows, N).to(dtype), torch.randn(N).to(dtype)
    check(forward(x, weight, format, size, bias), x, w.T, bias.double())
    check(gradient(dy, weight, format, size, K), dy, w)


GPUS = {"hopper": {}, "sm_80": {"hopper_code": False}, "no maps": {"maps": False}}
OF_FORMATS = [
    pytest.param(gpu, format, dtype, id=f"{format}-{str(dtype)[6:]}-{gpu}")
    for gpu, format, dtype in product(GPUS, FORMATS, DTYPES[1:])
    if gpu != "no maps" or (format, dtype) == ("int4", torch.bfloat16)  # sm_80's kernels, asked for by another way
]


@pytest.mark.parametrize(("gpu", "format", "dtype"), OF_FORMATS)
def test_tensor_cores_of_every_gpu(gpu, format, dtype):
    """130 rows, once in blocks of 128 rows, and of 256 on Hopper where there are enough; more steps than a ring has buffers."""
    size = SIZES.get(format, 64)
    emulated.configure(**GPUS[gpu])
    for N, K in ((140, 512), (520, 96 if format != "nf4" else 128)):
        weight = packed(N, K, format, size)
        w = _nf4.dequantize_groups(*weight, format, size)[:, :K].double()
        x, dy, bias = torch.randn(130, K).to(dtype), torch.randn(130, N).to(dtype), torch.randn(N).to(dtype)
        y, dx = forward(x, weight, format, size, bias), gradient(dy, weight, format, size, K)
        check(y, x, w.T, bias.double())
        check(dx, dy, w)
        emulated.configure("reverse", False, **GPUS[gpu])
        assert bitwise(forward(x, weight, format, size, bias), y) and bitwise(gradient(dy, weight, format, size, K), dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("format", FORMATS)
def test_scales_of_any_dtype_and_rows_anywhere(format, dtype):
    """float32, float16 and bfloat16 scales; x in rows with gaps, transposed and at an odd address; codes at an odd address."""
    size = SIZES.get(format, 64)
    codes, scales = packed(24, 64, format, size)
    for scale_dtype in DTYPES if format != "mxfp4" else ():
        few = scales.to(scale_dtype)
        w = _nf4.dequantize_groups(codes, few, format, size).double()
        check(forward(torch.eye(64)[:3].to(dtype), (codes, few), format, size), torch.eye(64)[:3].to(dtype), w.T)
    odd = torch.empty(codes.numel() + 1, dtype=codes.dtype)[1:].view_as(codes).copy_(codes)
    assert odd.data_ptr() % 16
    w = _nf4.dequantize_groups(codes, scales, format, size).double()
    for rows in (2, 40):
        wide = torch.randn(rows, 80).to(dtype)
        shifted = torch.randn(rows * 64 + 1).to(dtype)[1:].view(rows, 64)
        for x in (
            wide[:, 8:72],
            wide[:, 3:67],
            torch.randn(64, rows).to(dtype).T,
            shifted,
            wide[:1, :64].expand(rows, 64),
        ):
            check(forward(x, (odd, scales), format, size), x, w.T)
            check(gradient(x[:, :24], (codes, scales), format, size, 64), x[:, :24], w)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_any_batch(format, dtype):
    """Few rows: the order of a sum depends on K alone. Many: on the kernel."""
    size = SIZES.get(format, 64)
    weight = packed(20, 640, format, size)
    x = torch.randn(40, 640).to(dtype)
    each = torch.cat([forward(row, weight, format, size) for row in x[:8].split(1)])
    for rows in (2, 3, 5, 8):
        assert bitwise(forward(x[:rows], weight, format, size), each[:rows])
    assert bitwise(forward(x, weight, format, size)[:33], forward(x[:33], weight, format, size))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_nothing_to_sum(dtype, rows):
    """No features, no outputs: the bias, and zeros."""
    empty, bias = torch.zeros(rows, 0, dtype=dtype), torch.randn(5).to(dtype)
    codes = torch.zeros(5, 64, dtype=torch.int8)
    assert torch.equal(forward(empty, (codes[:, :0], torch.zeros(5, 0)), "int8", 32, bias), bias.expand(rows, 5))
    dx = gradient(empty, (codes[:0], torch.zeros(0, 2)), "int8", 32, 64)
    assert dx.shape == (rows, 64) and (dx == 0).all()


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_nan_and_inf_stay_in_their_rows(dtype, rows):
    weight = packed(40, 100, "int4", 32)
    x = torch.randn(rows, 100).to(dtype)
    clean = forward(x, weight, "int4", 32)
    x[0, 99], x[1, 3] = torch.nan, torch.inf
    y = forward(x, weight, "int4", 32)
    assert y[0].isnan().all() and not y[1].isfinite().any() and bitwise(y[2:], clean[2:])


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("format", FORMATS)
def test_no_order_changes_a_bit(format, dtype, rows):
    size = SIZES.get(format, 64)
    weight = packed(33, 384, format, size)
    x, dy = torch.randn(rows, 384).to(dtype), torch.randn(rows, 33).to(dtype)
    emulated.configure("forward", True)
    first = forward(x, weight, format, size), gradient(dy, weight, format, size, 384)
    for order, lazy in [("reverse", True), ("random", False)]:
        emulated.configure(order, lazy, seed=7)
        assert bitwise(forward(x, weight, format, size), first[0]), (order, lazy)
        assert bitwise(gradient(dy, weight, format, size, 384), first[1]), (order, lazy)


X, C8, S8 = torch.zeros(3, 40), torch.zeros(5, 64, dtype=torch.int8), torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((X[0], C8, S8, None, "int8", 32), r"quantized_linear: expected x \(M, K\)"),
        ((X, C8, S8, None, "int3", 32), "quantized_linear: format is int3; expected int8, int4, nf4 or mxfp4"),
        ((X, C8, S8, None, "int8", 33), "quantized_linear: group_size is 33; expected 32, 64 or 128"),
        ((X, C8, S8, None, "int4", 32), "quantized_linear: codes must be a matrix of uint8"),
        ((X, C8.byte(), S8.byte(), None, "mxfp4", 64), "quantized_linear: group_size is 64; mxfp4 has groups of 32"),
        ((X, C8[:, :32].byte(), S8, None, "mxfp4", 32), r"expected codes \(5, 32\) and scales \(5, 2\) of uint8"),
        ((X, C8[:, :32], S8, None, "int8", 32), r"expected codes \(5, 64\) and scales \(5, 2\) for 40 features"),
        ((X, C8, S8[:4], None, "int8", 32), r"expected codes \(5, 64\) and scales \(5, 2\) for 40 features"),
        ((X, C8, S8, torch.zeros(4), "int8", 32), "quantized_linear: bias has 4 values; expected 5"),
        ((X.double(), C8, S8, None, "int8", 32), "expected a float32, bfloat16 or float16 tensor"),
    ],
)
def test_what_the_operator_refuses(arguments, match):
    with pytest.raises(RuntimeError, match=match):
        torch.ops.gptfast_emu.quantized_linear_fwd(*arguments)


def test_what_the_gradient_refuses():
    with pytest.raises(RuntimeError, match="quantized_linear: dy has 4 columns; expected 5"):
        gradient(torch.zeros(3, 4), (C8, S8), "int8", 32, 40)
    with pytest.raises(RuntimeError, match="a weight of 5 outputs and -1 features"):
        gradient(torch.zeros(3, 5), (C8, S8), "int8", 32, -1)
