"""relu_squared: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops
from gptfast.testing import cases, check_case, dtypes
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("relu_squared")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("n", range(34))
def test_every_tail_length(n, isa):
    """All lengths from 0 to two AVX-512 vectors, at each misalignment of a 16-byte line."""
    for shift in range(4):
        x = torch.randn(n + shift)[shift:].requires_grad_()
        y = ops.relu_squared(x)
        (dx,) = torch.autograd.grad(y, x, torch.arange(n).float())
        assert torch.equal(y, F.relu(x).square())
        assert torch.equal(dx, 2 * F.relu(x.detach()) * torch.arange(n).float())


def test_extremes(isa):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, float("inf"), -float("inf"), float("nan")])
    x.requires_grad_()
    y = ops.relu_squared(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    inf = float("inf")
    assert y[:8].tolist() == [0, 0, 0, 0, inf, 0, inf, 0] and y[8].isnan()
    torch.testing.assert_close(g[:8], torch.tensor([0, 0, 2e-30, 0, 2e30, 0, inf, 0]), rtol=1e-6, atol=0)
    assert ops.relu_squared(torch.tensor(3.0)).item() == 9


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.float32)


def test_pure():
    for case in CASES:
        check_pure(case, torch.bfloat16)


def test_fp64_passes_gradcheck():
    torch.autograd.gradcheck(ops.relu_squared, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


def test_compiles():
    check_compiles(lambda x: ops.relu_squared(x) * 2, torch.randn(6, 16))


def test_no_double_backward():
    check_no_double_backward(ops.relu_squared, torch.randn(4), "relu_squared: double backward")


def test_as_an_activation():
    """The name in transformers is relu2."""
    activations = pytest.importorskip("transformers.activations")
    x, w, b = torch.randn(40, 8), torch.randn(5, 8), torch.randn(5)
    expected = activations.ACT2FN["relu2"](F.linear(x, w, b))
    torch.testing.assert_close(ops.linear(x, w, b, "relu_squared"), expected, rtol=1e-5, atol=1e-5)


def test_errors():
    with pytest.raises(TypeError, match=r"relu_squared: x has dtype torch.int64; expected float32"):
        ops.relu_squared(torch.ones(3).long())
    with pytest.raises(TypeError, match="relu_squared: x is a NoneType"):
        ops.relu_squared(None)
