"""quantized_linear's CPU kernels: every number of rows, odd shapes, tiles of AMX, threads, memory, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gptfast import _nf4, backend, ops
from gptfast.backend import BFLOAT16_ISAS, cpu_isas, force_cpu_isa
from tests.support.native_calls import at_the_edge

if not cpu_isas():
    pytest.skip("this install has no compiled ops", allow_module_level=True)

ISAS = cpu_isas()
NATIVE = torch.ops.gptfast
# Of the sum of the products' magnitudes: fp32 sums, and weights that are rounded to bf16 where pairs of it are multiplied.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 1e-6}


def quantized(N: int, K: int, format: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)) * K**-0.5
    if format == "nf4":
        return ops.quantize_nf4(weight, block_size=size).rows(N)
    if format == "mxfp4":
        return ops.quantize_mxfp4(weight)
    return ops.quantize_groups(weight, format, group_size=size)


def poison() -> None:
    """Fill the memory that the next results will get, and the scratch memory of products, with nan."""
    for n in (64, 4096, 1 << 16, 1 << 20):
        torch.full((n,), float("nan"))
    codes, scales = torch.full((1024, 512), 1, dtype=torch.int8), torch.full((1024, 16), float("nan"))
    for rows in (1, 40):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.full((rows, 512), float("nan"), dtype=dtype, requires_grad=True)
            ops.quantized_linear(x, codes, scales).sum().backward()


def check(M: int, K: int, N: int, format: str, size: int, dtype: torch.dtype) -> None:
    """Result and gradient against products of the dequantised weight in float64."""
    codes, scales = quantized(N, K, format, size)
    weight = _nf4.dequantize_groups(codes, scales, format, size)[:, :K].double()
    x, dy, bias = (torch.randn(s).to(dtype) for s in ((M, K), (M, N), (N,)))
    x.requires_grad_()
    poison()
    y = ops.quantized_linear(x, codes, scales, bias, format=format, group_size=size, backend="cpu")
    (dx,) = torch.autograd.grad(y, x, dy)
    wide, dy_wide = x.detach().double(), dy.double()
    exact, magnitude = wide @ weight.T + bias.double(), wide.abs() @ weight.abs().T + bias.double().abs()
    for got, right, of in (
        (y.detach(), exact, magnitude),
        (dx, dy_wide @ weight, dy_wide.abs() @ weight.abs()),
    ):
        assert got.dtype == dtype and got.shape == right.shape
        rounding = torch.finfo(dtype).eps * right.abs() + (2**-24 if dtype == torch.float16 else 0)  # of the result
        bound = ROUNDING[dtype] * of + rounding
        assert ((got.double() - right).abs() <= bound).all(), (M, K, N, format, size, dtype)


@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "mxfp4"])
def test_every_number_of_rows(isa, format):
    """1 to 65 rows: single rows in tiles of 8, 4, 2 and 1, then products of blocks."""
    K, size = (192, 64) if format == "nf4" else (200, 32)  # no whole groups, tiles or chunks
    for M in (*range(1, 20), 31, 32, 33, 48, 63, 64, 65):
        check(M, K, 37, format, size, (torch.float32, torch.bfloat16)[M % 2])


SHAPES = [
    *((2, 32, 1), (97, 64, 33), (96, 1088, 70), (130, 2112, 96)),
    (33, 4160, 5),  # words of k in two stretches when they are not pairs
    (3, 8256, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_shapes(isa, M, K, N, dtype):
    for format, size in (("nf4", 64), ("nf4", 32), ("int4", 128), ("int8", 64), ("mxfp4", 32)):
        check(M, -(-K // size) * size if format == "nf4" else K - 1, N, format, size, dtype)


@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_incomplete_chunks_of_few_rows(isa, format):
    """Rows whose last chunk of codes ends early: nothing is read past the weight, and a nan among the scales of an output, which
    lie behind those of the one before, stays in that output."""
    for size in (32, 64):
        for K in (size, 3 * size, 5 * size, 1024 + size):
            for N in (1, 3, 6, 37):
                codes, scales = quantized(N, K, format, size)
                x = torch.randn(8, K)
                spoilt = scales.clone()
                spoilt[N // 2, 0] = float("nan")
                for dtype in (torch.float32, torch.bfloat16):
                    arguments = {"format": format, "group_size": size, "backend": "cpu"}
                    y = ops.quantized_linear(x.to(dtype), codes, scales, **arguments)
                    for M in (1, 2, 4, 8):
                        few = x[:M].to(dtype)
                        got = ops.quantized_linear(few, at_the_edge(codes), at_the_edge(scales), **arguments)
                        assert torch.equal(got, y[:M])
                        got = ops.quantized_linear(few, codes, spoilt, **arguments)
                        assert got[:, N // 2].isnan().all() and got.isnan().sum() == M
                        got[:, N // 2] = y[:M, N // 2]
                        assert torch.equal(got, y[:M])


def test_nothing_is_read_past_doubly_quantized_scales(isa):
    """Bytes that end anywhere in a vector, before memory that cannot be read."""
    for N, K, size in ((1, 64, 64), (3, 192, 64), (5, 416, 32), (37, 128, 128), (33, 1152, 64)):
        codes, _ = quantized(N, K, "nf4", size)
        scales = torch.randint(0, 256, (N, K // size), dtype=torch.uint8)
        nested, offset = torch.rand(-(-scales.numel() // 256)), torch.rand(())
        decoded = _nf4.nf4_absmax(scales, nested, offset).view(N, -1)
        for M in (1, 20):
            x = torch.randn(M, K).bfloat16()
            got = NATIVE.quantized_linear_fwd(
                x, codes, at_the_edge(scales), None, "nf4", size, at_the_edge(nested), at_the_edge(offset[None])
            )
            assert torch.equal(got, NATIVE.quantized_linear_fwd(x, codes, decoded, None, "nf4", size)), (N, K, M)


def test_a_row_depends_on_no_other(isa, threads, monkeypatch):
    """With our own products the bits of a row are the same alone in its block, at any place, and for any number of threads."""
    monkeypatch.setattr(sys.modules["gptfast.ops.gemm"], "_FORCED", "own")
    codes, scales = quantized(300, 576, "nf4", 64)
    x = torch.randn(209, 576).bfloat16()
    run = lambda x: ops.quantized_linear(x, codes, scales, format="nf4", group_size=64)  # noqa: E731
    y = run(x)
    assert torch.equal(run(x[100:117]), y[100:117])
    torch.set_num_threads(3)
    assert torch.equal(run(x), y)
    few = run(x[:8])
    assert all(torch.equal(run(x[m : m + 1]), few[m : m + 1]) for m in range(8))


@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "mxfp4"])
def test_stretches_that_a_library_multiplies(format, monkeypatch):
    """As on a CPU with AMX: several stretches of outputs and of inputs, the last one smaller; single rows are as ever."""
    monkeypatch.setattr(sys.modules["gptfast.ops.quantized_linear"], "DECODED", 8000)
    K, size = (192, 64) if format == "nf4" else (200, 32)
    seen = []
    decode = torch.ops.gptfast.quantized_decode
    monkeypatch.setattr(torch.ops.gptfast, "quantized_decode", lambda *a: seen.append(a[4]) or decode(*a))
    for name in ("torch", "onednn"):
        monkeypatch.setattr(sys.modules["gptfast.ops.gemm"], "_FORCED", name)
        for M in (15, 16, 70):
            check(M, K, 101, format, size, torch.bfloat16)
            check(M, K, 101, format, size, torch.float32)
    assert seen.count(K) == (2 * 2 * (3 + 3) if cpu_isas()[-1] in BFLOAT16_ISAS else 0), seen


@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "mxfp4"])
def test_decoded_weights(isa, format):
    """The weight rounded to bfloat16, any columns from a group's begin on."""
    for K, size in ((640, 32), (640, 64), (1152, 128))[: 1 if format == "mxfp4" else 3]:
        codes, scales = quantized(5, K, format, size)
        wanted = _nf4.dequantize_groups(codes, scales, format, size).bfloat16()
        for first, last in ((0, K), (size, K), (2 * size, 2 * size + 37), (size, size)):
            got = torch.ops.gptfast.quantized_decode(codes, scales, format, size, K, first, last)
            assert torch.equal(got, wanted[:, first:last])


def test_no_instruction_set_is_the_odd_one_out():
    """In float32 all give the same up to rounding, beside a reference that cannot share a mistake with them."""
    codes, scales = quantized(50, 320, "int4", 32)
    x = torch.randn(20, 320)
    results = []
    for name in ISAS:
        with force_cpu_isa(name):
            results.append(ops.quantized_linear(x, codes, scales, format="int4"))
    with backend("eager"):
        results.append(ops.quantized_linear(x, codes, scales, format="int4"))
    for y in results[1:]:
        torch.testing.assert_close(y, results[0], rtol=1e-5, atol=1e-5)


def test_scales_of_every_dtype():
    codes, scales = quantized(9, 96, "int8", 32)
    x = torch.randn(4, 96)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = ops.quantized_linear(x, codes, scales.to(dtype))
        weight = _nf4.dequantize_groups(codes, scales.to(dtype), "int8", 32)
        torch.testing.assert_close(y, (x.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-5)


MEMORY = """
import torch, resource
from gptfast import ops
N, K = 12288, 8192
codes, scales = torch.randint(0, 255, (N, K // 2), dtype=torch.uint8), torch.rand(N, K // 64)
x = torch.randn(32, K, dtype=torch.bfloat16, requires_grad=True)
small = ops.quantized_linear(x[:, :64], codes[:9, :32].contiguous(), scales[:9, :1], format="nf4", group_size=64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.quantized_linear(x, codes, scales, format="nf4", group_size=64).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_matrix_is_never_dequantized_whole():
    """201 MB in bf16, of which 24 MB more than before are resident at most: 4 MB decoded at a time, in both directions."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 24, result.stdout


X, C8, S8 = torch.zeros(3, 40), torch.zeros(5, 64, dtype=torch.int8), torch.zeros(5, 2)
X4, C4, S4 = torch.zeros(3, 64), torch.zeros(5, 32, dtype=torch.uint8), torch.zeros(5, 2)
B4 = S4.byte()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((X, C8, S8, None, "int3", 32), "quantized_linear: format is int3; expected int8, int4, nf4 or mxfp4"),
        ((X, C8, S8, None, "int8", 33), "quantized_linear: group_size is 33; expected 32, 64 or 128"),
        ((X, C8.byte(), S8.byte(), None, "mxfp4", 64), "quantized_linear: group_size is 64; mxfp4 has groups of 32"),
        ((X, C8[:, :32].byte(), S8, None, "mxfp4", 32), r"expected codes \(5, 32\) and scales \(5, 2\) of uint8"),
        ((X, C8, S8.byte(), None, "int8", 32), "expected a float32, bfloat16 or float16 tensor"),
        ((X, C8, S8, None, "int4", 32), "quantized_linear: codes must be a CPU matrix of uint8"),
        (
            (X, C8[:, :32], S8, None, "int8", 32),
            r"expected codes \(5, 64\) and scales \(5, 2\) for 40 features in int8",
        ),
        ((X, C8, S8[:4], None, "int8", 32), r"expected codes \(5, 64\) and scales \(5, 2\)"),
        ((X[0], C8, S8, None, "int8", 32), r"expected x \(M, K\)"),
        ((X, C8, S8, torch.zeros(4), "int8", 32), "expected a CPU vector of 5 values, got 4"),
        ((X.double(), C8, S8, None, "int8", 32), "expected a float32, bfloat16 or float16 tensor"),
        ((X4, C4, S4, None, "nf4", 32, torch.ones(1)), "nested_absmax and offset go together, with format nf4"),
        ((X4, C4, B4, None, "int4", 32, torch.ones(1), torch.ones(1)), "go together, with format nf4"),
        ((X4, C4, S4, None, "nf4", 32, torch.ones(1), torch.ones(1)), r"scales \(5, 2\) of uint8 for 64 features"),
        ((X4, C4, B4, None, "nf4", 32, torch.ones(2), torch.ones(1)), "nested_absmax must be 1 float32 values"),
        ((X4, C4, B4, None, "nf4", 32, torch.ones(1), torch.ones(2)), "offset must be 1 float32 values"),
        ((X4, C4, B4, None, "nf4", 32, torch.ones(1), torch.ones(1).int()), "offset must be 1 float32 values"),
    ],
)
def test_the_operator_checks_its_arguments(arguments, match):
    with pytest.raises(RuntimeError, match=match):
        NATIVE.quantized_linear_fwd(*arguments)


def test_the_backward_operator_checks_its_arguments():
    with pytest.raises(RuntimeError, match="dy has 4 columns; expected 5"):
        NATIVE.quantized_linear_bwd(torch.zeros(3, 4), C8, S8, "int8", 32, 40)
    with pytest.raises(RuntimeError, match="quantized_linear: -1 features"):
        NATIVE.quantized_linear_bwd(torch.zeros(3, 5), C8, S8, "int8", 32, -1)
