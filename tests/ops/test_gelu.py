"""gelu: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops
from gptfast.testing import Case, cases, check_case, dtypes
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("gelu")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("N", "C"), [(300, 8), (8300, 3), (2, 4104)])
def test_many_rows_and_long_rows(N, C, dtype, isa):
    """More rows than there are parts of the sum over rows; rows longer than what one block of threads covers."""
    check_case(Case("gelu", {"N": N, "C": C}), dtype)


@pytest.mark.parametrize("n", range(34))
def test_every_tail_length(n, isa):
    """All lengths from 0 to two AVX-512 vectors, at each misalignment of a 16-byte line."""
    for shift in range(4):
        x = torch.randn(n + shift)[shift:]
        torch.testing.assert_close(ops.gelu(x, approximate="tanh"), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_extremes(approximate, isa):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 8.0, -8.0, 50.0, -50.0, 1e30, -1e30, 3e38, float("inf"), float("nan")])
    x.requires_grad_()
    y = ops.gelu(x, approximate=approximate)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert y[:11].isfinite().all() and y[11] == float("inf") and y[12].isnan()
    assert torch.equal(y[6:11:2], x[6:11:2]) and (y[7:10:2] == 0).all()
    assert (g[[6, 8]] == 1).all() and (g[[7, 9]].abs() < 1e-30).all() and g[:2].eq(0.5).all()


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.float32)


def test_pure():
    for case in CASES:
        check_pure(case, torch.bfloat16)


def test_fp64_runs_in_eager_and_passes_gradcheck():
    x, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for approximate in ("tanh", "none"):
        torch.autograd.gradcheck(
            lambda x, b, a=approximate: ops.gelu(x, b, a), (x.requires_grad_(), bias.requires_grad_())
        )


def test_compiles():
    x, bias = torch.randn(6, 16), torch.randn(16)
    check_compiles(lambda x, b: ops.gelu(x, b, "none") * 2, x, bias)
    check_compiles(lambda v: ops.gelu(v, v), bias)  # the same tensor twice


def test_opcheck():
    x, bias = torch.randn(3, 4), torch.randn(4)
    torch.library.opcheck(torch.ops.gptfast.gelu_fwd.default, (x, bias, True))
    torch.library.opcheck(torch.ops.gptfast.gelu_fwd.default, (x.T, None, False))
    torch.library.opcheck(torch.ops.gptfast.gelu_bwd.default, (x, x, bias, True))


def test_no_double_backward():
    check_no_double_backward(ops.gelu, torch.randn(4), "gelu: double backward")


def test_bias_of_another_dtype():
    x, bias = torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(8, requires_grad=True)
    y = ops.gelu(x, bias)
    assert y.dtype == torch.bfloat16
    (g,) = torch.autograd.grad(y.float().sum(), bias)
    assert g.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.gelu([1.0]), TypeError, r"gelu: x is a list; expected a torch.Tensor"),
        (lambda: ops.gelu(torch.ones(2, dtype=torch.int32)), TypeError, r"gelu: x has dtype torch.int32"),
        (
            lambda: ops.gelu(torch.ones(2, 3), torch.ones(2)),
            ValueError,
            r"gelu: bias has shape \(2,\); expected \(3,\)",
        ),
        (
            lambda: ops.gelu(torch.ones(2), approximate="erf"),
            ValueError,
            r"gelu: approximate is 'erf'; expected one of",
        ),
        (
            lambda: ops.gelu(torch.ones(2), torch.ones(2, device="meta")),
            ValueError,
            r"gelu: all tensors must be on one",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
