"""grouped_linear: parity, each group as `linear` alone, layouts of the weight, groups without rows or with few, errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gptfast import ops
from gptfast.ops import gemm
from gptfast.testing import cases, check_case, dtypes
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("grouped_linear")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


def test_properties():
    for dtype in DTYPES:
        check_repeatable(CASES[2], dtype)
        check_pure(CASES[2], dtype)
    x, offsets, weight, bias = CASES[2].inputs(torch.float32)
    check_compiles(ops.grouped_linear, x, offsets, weight, bias)
    message = "grouped_linear: double backward"
    check_no_double_backward(lambda x: ops.grouped_linear(x, offsets, weight) ** 2, x, message)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_group_is_linear(dtype, by_columns):
    """The bits of `linear` with the group's weight, whichever way it is stored, and gradients laid out as it is."""
    x, bias = torch.randn(70, 24, dtype=dtype), torch.randn(3, 40, dtype=dtype)
    weight = torch.randn(3, 24, 40, dtype=dtype).transpose(1, 2) if by_columns else torch.randn(3, 40, 24, dtype=dtype)
    offsets, found, wanted = [0, 30, 30, 70], [], []
    for grouped, kept in ((True, found), (False, wanted)):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        if grouped:
            y = ops.grouped_linear(leaves[0], torch.tensor(offsets), *leaves[1:])
        else:
            y = torch.cat(
                [ops.linear(leaves[0][a:b], leaves[1][g], leaves[2][g]) for g, a, b in ((0, 0, 30), (2, 30, 70))]
            )
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))
        kept += [y, *(t.grad for t in leaves)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert found[2].stride() == weight.stride() and not found[2][1].any() and not found[3][1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_large_groups_are_linear(dtype, by_columns, isa, threads):
    """Sums carried from one stretch of k to the next, and columns of several threads: the bits of `linear`."""
    K, N = (8300, 40) if dtype == torch.bfloat16 else (70, 600)
    weight = torch.randn(2, K, N).mT if by_columns else torch.randn(2, N, K)
    x, offsets, weight = torch.randn(133, K).to(dtype), torch.tensor([0, 20, 133]), (weight / K**0.5).to(dtype)
    y = ops.grouped_linear(x, offsets, weight)
    for g, a, b in ((0, 0, 20), (1, 20, 133)):
        assert torch.equal(y[a:b], ops.linear(x[a:b], weight[g]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 31, 64, 200])
def test_groups_of_few_rows(dtype, K, isa, threads):
    """Each row has the bits that it has alone, in any group of fewer than 16 rows, and is a product to a rounding."""
    rows = [1, 15, 0, 2, 7]
    offsets = torch.tensor([0, *rows]).cumsum(0)
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((sum(rows), K), (len(rows), 77, K), (len(rows), 77)))
    y = ops.grouped_linear(x, offsets, weight, bias)
    for g, (a, b) in enumerate(pairwise(offsets.tolist())):
        own = torch.tensor([b > a and n > g for n in range(len(rows) + 1)]).long()  # one row, of group g
        for r in range(a, b):
            assert torch.equal(ops.grouped_linear(x[r : r + 1], own, weight, bias)[0], y[r])
        wanted = x[a:b].double() @ weight[g].double().T + bias[g].double()
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(y[a:b].double(), wanted, rtol=rounding, atol=2e-6 * K**0.5 + 1e-6)


@pytest.mark.parametrize("by_columns", [False, True])
def test_few_rows_in_all(by_columns, monkeypatch):
    """Also where our kernels leave a matrix to a library."""
    monkeypatch.setattr(gemm, "_FORCED", "")
    x, offsets = torch.randn(7, 24), torch.tensor([0, 2, 2, 7])
    weight = torch.randn(3, 24, 40).mT if by_columns else torch.randn(3, 40, 24)
    wanted = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T])
    with torch.no_grad():
        torch.testing.assert_close(ops.grouped_linear(x, offsets, weight), wanted, rtol=1e-5, atol=1e-5)


def test_autocast():
    x, weight, offsets = torch.randn(40, 8), torch.randn(2, 6, 8), torch.tensor([0, 20, 40])
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.grouped_linear(x, offsets, weight)
        assert y.dtype == torch.bfloat16 and torch.equal(y[:20], ops.linear(x[:20], weight[0]))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_errors(backend):
    x, weight, bias = torch.randn(4, 3), torch.randn(2, 5, 3), torch.randn(2, 5)
    for arguments, error, message in (
        ((x, torch.tensor([0, 4]), weight), ValueError, r"shape \(3,\), one more than there are groups"),
        ((x, torch.tensor([0.0, 1, 4]), weight), ValueError, "offsets is torch.float32"),
        (
            (x, torch.tensor([0, 3, 5]), weight),
            ValueError,
            r"offsets are \[0, 3, 5\]; expected numbers that rise from 0 to 4",
        ),
        ((x, torch.tensor([0, 5, 4]), weight), ValueError, "rise from 0 to 4"),
        ((x, torch.tensor([1, 3, 4]), weight), ValueError, "rise from 0 to 4"),
        ((x, torch.tensor([0, 3, 4]), weight[:, :, :2]), ValueError, r"x has shape \(4, 3\) and weight \(2, 5, 2\)"),
        ((x, torch.tensor([0, 3, 4]), weight, bias[:, :4]), ValueError, r"bias has shape \(2, 4\)"),
        ((x, torch.tensor([0, 3, 4]), weight.double()), TypeError, "x is torch.float32 but weight is torch.float64"),
        ((x, torch.tensor([0, 3, 4]), weight, bias.half()), TypeError, "bias is torch.float16"),
        ((x, torch.tensor([0, 3, 4], device="meta"), weight), ValueError, "all tensors must be on one device"),
    ):
        with pytest.raises(error, match=message):
            ops.grouped_linear(*arguments, backend=backend)
