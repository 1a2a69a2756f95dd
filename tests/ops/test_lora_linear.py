"""lora_linear: parity with float64 on every ISA, ranges of rows, dropout, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.backend import KERNEL_DTYPES, has_cpu_ops
from gptfast.ops import LowRank
from gptfast.ops.lora_linear import lora_linear
from tests.support import X86_PAIRS

SHAPES = [(1, 5, 3, 1), (20, 33, 70, 4), (97, 65, 31, 8), (40, 130, 257, 3)]  # rows, in, out, r
SEED, OFFSET, P = 7, 3, 0.25


def tensors(m: int, k: int, n: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(m, k), (n, k), (n,), (r, k), (n, r), (2, k), (n, 2)]
    return [(torch.randn(s) / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]


def updates_of(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, m: int) -> list[LowRank]:
    """The second has only some of the rows, which the first has too."""
    return [
        LowRank(a, b, 0.5, dropout_p=P, seed=SEED, offset=OFFSET),
        LowRank(a2, b2, -1.5, first=m // 3, last=m - m // 4),
    ]


def expected(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    m = len(x)
    y = x @ w.t() + bias + 0.5 * ops.dropout(x, P, SEED, OFFSET, backend="eager") @ a.t() @ b.t()
    some = slice(m // 3, m - m // 4)
    return torch.cat([y[: some.start], y[some] - 1.5 * x[some] @ a2.t() @ b2.t(), y[some.stop :]])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, ...], dtype: torch.dtype, isa: Any):
    torch.manual_seed(sum(shape))
    given = tensors(*shape, dtype)
    y = lora_linear(*given[:3], updates=updates_of(*given[3:], shape[0]))
    dy = torch.randn_like(y)
    exact = [x.detach().double().requires_grad_() for x in given]
    want = expected(*exact)
    got = [y, *torch.autograd.grad(y, given, dy)]
    # A value is the sum of the base's and two updates' products, each rounded once more than float64's. Measured at 20 seeds:
    # of the tensor's largest value at most 6.9e-7 in fp32, 0.018 in bf16, 0.0042 in fp16 (x after dropout is rounded too).
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.5e-2, torch.float16: 6e-3}[dtype]
    for result, right in zip(got, [want, *torch.autograd.grad(want, exact, dy.double())], strict=True):
        assert (result - right).abs().max() <= tolerance * right.abs().max(), result.shape


def test_rows_without_an_update_have_the_bits_of_linear():
    x, w, bias, a, b, *_ = tensors(64, 48, 80, 4, torch.float32)
    y = lora_linear(x, w, bias, updates=[LowRank(a, b, first=10, last=30)])
    base = ops.linear(x, w, bias)
    assert torch.equal(y[:10], base[:10]) and torch.equal(y[30:], base[30:]) and not torch.equal(y[10:30], base[10:30])


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
@pytest.mark.parametrize(
    ("K", "M", "N"), [(2, 1, 1), (65, 8, 32), (131, 3, 37), (1, 4, 256), (640, 13, 301), (7, 32, 600)]
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_products_of_few_columns(isa, K, M, N, kind):
    """a^T b from parts of larger matrices whose other values are nan, into a part of one, whose others stay."""
    a, b = torch.full((K, M + 3), torch.nan), torch.full((K + 1, N + 5), torch.nan, dtype=torch.bfloat16)
    a[:, 1 : M + 1], b[:K, 2 : N + 2] = torch.randn(K, M), torch.randn(K, N).bfloat16()
    a = a.to(kind)
    out = torch.full((M + 1, N + 4), 7.0, dtype=kind)
    torch.ops.gptfast.gemm_few(a[:, 1 : M + 1], b[:K, 2 : N + 2], out[:M, 1 : N + 1])
    left, right = a[:, 1 : M + 1].bfloat16().double(), b[:K, 2 : N + 2].double()
    rounding = 2e-6 if isa in X86_PAIRS else 2**-8  # there a is not rounded
    bound = rounding * (left.abs().T @ right.abs()) + torch.finfo(kind).eps * (left.T @ right).abs()
    assert ((out[:M, 1 : N + 1].double() - left.T @ right).abs() <= bound).all()
    out[:M, 1 : N + 1] = 7.0
    assert (out == 7).all()


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (3, 8, 32), (64, 7, 65), (11, 32, 131), (200, 16, 770), (5, 9, 31)]
)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_columns", [True, False])
def test_products_into_few_columns(isa, M, N, K, kind, by_columns):
    """a b of parts of larger matrices whose other values are nan, into a part of one; each row has the bits that it has alone."""
    a = torch.full((M + 1, K + 3), torch.nan, dtype=torch.bfloat16)
    b = torch.full((N + 1, K + 2) if by_columns else (K + 2, N + 1), torch.nan, dtype=kind)
    a[:M, 1 : K + 1] = torch.randn(M, K).bfloat16()
    left, right = a[:M, 1 : K + 1], b[:N, :K].t() if by_columns else b[:K, :N]
    right.copy_(torch.randn(K, N))
    out = torch.full((M + 1, N + 4), 7.0)
    torch.ops.gptfast.gemm_narrow(left, right, out[:M, 1 : N + 1])
    got = out[:M, 1 : N + 1].clone()
    exact = left.double(), right.bfloat16().double()
    # measured at 20 seeds: at most 5.3e-8 of the sum of magnitudes on the ISAs of pairs; on the others b is not rounded
    rounding = 4e-7 if isa in X86_PAIRS else 2**-8
    assert ((got.double() - exact[0] @ exact[1]).abs() <= rounding * (exact[0].abs() @ exact[1].abs()) + 1e-30).all()
    out[:M, 1 : N + 1] = 7.0
    assert (out == 7).all()
    if isa in X86_PAIRS:
        for row in {0, M // 2, M - 1}:
            torch.ops.gptfast.gemm_narrow(left[row : row + 1], right, out[:1, :N])
            assert torch.equal(out[0, :N], got[row])


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (9, 31, 2), (17, 75, 8), (24, 801, 32), (100, 64, 7)])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("by_columns", [True, False])
def test_products_of_few_k(isa, M, N, K, accumulate, by_columns):
    """C (+)= A B, added where it lies, has the bits of the product that gathers C first, which one of more k is."""
    a, b = torch.randn(M, K), torch.randn(K, N)
    longer = torch.cat((a, torch.zeros(M, 40 - K)), 1), torch.cat((b, torch.zeros(40 - K, N)))
    out = torch.randn(2, M + 1, N + 4).bfloat16()
    out[1] = out[0]
    before = out[0].clone()
    for c, (left, right) in zip(out, ((a, b), longer), strict=True):
        right = right.t().contiguous().t() if by_columns else right
        torch.ops.gptfast.gemm(left, right, None, c[:M, 1 : N + 1], True, accumulate, None)
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], before)
    inside = torch.zeros_like(before, dtype=torch.bool)
    inside[:M, 1 : N + 1] = True
    assert torch.equal(out[0][~inside], before[~inside])


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": -1}, "rows -1 to 20; expected a range within x's 20 rows"),
        ({"last": 21}, "rows 0 to 21"),
        ({"last": -2}, "rows 0 to -2"),
        ({"first": 9, "last": 8}, "rows 9 to 8"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": 1e300}, "scale is 1e\\+300"),
        ({"dropout_p": 1.5}, "dropout_p is 1.5; expected a probability"),
        ({"a": torch.randn(4, 32)}, r"a has shape \(4, 32\) and b \(70, 4\) beside a weight of \(70, 33\)"),
        ({"b": torch.randn(70, 5)}, r"b \(70, 5\)"),
        ({"b": torch.randn(70, 4, device="meta")}, "must be on one device"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else "",
)
def test_errors(wrong: dict[str, Any], message: str, backend: str | None):
    x, w, bias, a, b, *_ = tensors(20, 33, 70, 4, torch.float32)
    with pytest.raises(ValueError, match=f"lora_linear: .*{message}"):
        lora_linear(x, w, bias, updates=[LowRank(**{"a": a, "b": b, **wrong})], backend=backend)
