"""dropout and dropout_mask: the contract mask on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch
from op_properties import check_compiles, check_pure, check_repeatable

from gptfast import ops, rng
from gptfast.testing import cases, check_case, dtypes

CASES = cases("dropout")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("cols", [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 129, 1025])
def test_mask_equals_the_contract(cols, isa):
    for p in (0.0, 0.1, 0.5, 1.0):
        key = {"seed": 2**64 - 3, "offset": 2**32 - 1}
        mask = ops.dropout_mask((3, 5, cols), p, **key)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, rng.dropout_keep((3, 5, cols), p, **key))


def test_all_ops_share_one_mask(isa):
    x = torch.ones(6, 40)
    keep = ops.dropout_mask((1, 6, 40), 0.5, seed=3, offset=4)[0]
    assert torch.equal(ops.dropout(x, 0.5, 3, 4) != 0, keep)
    total = ops.add_layer_norm(x, torch.zeros_like(x), x[0], dropout_p=0.5, seed=3, offset=4)[1]
    assert torch.equal(total != 0, keep)


def test_dropping_everything_drops_nan(isa):
    x = torch.full((2, 9), float("nan"))
    assert (ops.dropout(x, 1.0) == 0).all()


def test_linear_any_number_of_times():
    x = torch.randn(3, 8, requires_grad=True)
    v = torch.randn(3, 8, requires_grad=True)
    (g,) = torch.autograd.grad(ops.dropout(x, 0.5, 1), x, v, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), v)
    assert torch.equal(gg, ops.dropout(torch.ones(3, 8), 0.5, 1))


def test_scalars_and_vectors():
    assert ops.dropout(torch.tensor(2.0), 0.0) == 2
    assert ops.dropout(torch.ones(5), 0.0).shape == (5,)


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.bfloat16)


def test_pure():
    for case in CASES:
        check_pure(case, torch.float32)


def test_compiles_and_opchecks():
    x = torch.randn(6, 16)
    check_compiles(lambda x: ops.dropout(x, 0.3, 2, 5) * 2, x)
    torch.library.opcheck(torch.ops.gptfast.dropout.default, (x, 0.3, 2, 5))
    torch.library.opcheck(torch.ops.gptfast.dropout_mask.default, (2, 3, 4, 0.3, 2, 5))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.dropout(torch.ones(2), 1.1), ValueError, "dropout: p is 1.1; expected a probability"),
        (lambda: ops.dropout(torch.ones(2).long(), 0.1), TypeError, "dropout: x has dtype torch.int64"),
        (lambda: ops.dropout(torch.ones(2), 0.1, seed=-1), ValueError, "dropout: seed is -1"),
        (lambda: ops.dropout_mask((2, 3), 0.1), ValueError, "dropout_mask: shape is"),
        (lambda: ops.dropout_mask((1, 2, -3), 0.1), ValueError, "dropout_mask: shape is"),
        (lambda: ops.dropout_mask((1, 2, 3), float("nan")), ValueError, "dropout_mask: p is nan"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
