"""lora_linear: parity with float64 on every ISA, ranges of rows, dropout, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.backend import KERNEL_DTYPES
from gptfast.ops.lora_linear import LowRank, lora_linear

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
