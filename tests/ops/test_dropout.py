"""dropout and dropout_mask: the contract mask on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops, rng
from gptfast.testing import cases, check_case, dtypes
from tests.support.op_properties import check_compiles, check_pure, check_repeatable

CASES = cases("dropout")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("cols", [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 129, 1025, 2048, 4133])
def test_mask_equals_the_contract(cols, isa):
    for p in (0.0, 0.1, 0.5, 1.0):
        key = {"seed": 2**64 - 3, "offset": 2**32 - 1}
        mask = ops.dropout_mask((3, 5, cols), p, **key)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, rng.dropout_keep((3, 5, cols), p, **key))


def test_every_tail_length(isa):
    """All lengths from 0 to two AVX-512 vectors, at each misalignment of a 16-byte line."""
    for n in range(34):
        for shift in range(4):
            x = torch.randn(3, n + shift)[:, shift:]
            keep = rng.dropout_keep((1, 3, n), 0.4, 7, 1)[0]
            expected = torch.where(keep, x * rng.dropout_scale(0.4), 0.0)
            torch.testing.assert_close(ops.dropout(x, 0.4, seed=7, offset=1), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("C", [8, 24, 32, 104, 256, 1032, 2304])
def test_every_aligned_width(C, dtype, isa):
    """Whole 16-byte vectors, where lanes share Philox calls; then rows of a larger buffer, aligned and not."""
    keep = rng.dropout_keep((1, 5, C), 0.4, 3, 9)[0]
    for gap, start in ((0, 0), (16, 8), (3, 0), (8, 1)):
        x = torch.ones(5, C + gap, dtype=dtype)[:, start : C + start]
        assert torch.equal(ops.dropout(x, 0.4, seed=3, offset=9) != 0, keep), (gap, start)


def test_layouts():
    """Rows are numbered over the leading dimensions, however the tensor lies in memory."""
    x = torch.randn(5, 3, 4, 6)
    expected = ops.dropout(x, 0.5, seed=1)
    for order in ((3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 1, 3)):
        stored = x.permute(order).contiguous().permute([order.index(n) for n in range(4)])
        assert torch.equal(ops.dropout(stored, 0.5, seed=1), expected)
    assert torch.equal(expected.view(60, 6), ops.dropout(x.view(60, 6), 0.5, seed=1))
    expanded = torch.ones(2, 1, 1).expand(2, 3, 8)
    assert torch.equal(ops.dropout(expanded, 0.5, seed=1), ops.dropout(torch.ones(2, 3, 8), 0.5, seed=1))


def test_all_ops_share_one_mask(isa):
    x = torch.ones(6, 40)
    keep = ops.dropout_mask((1, 6, 40), 0.5, seed=3, offset=4)[0]
    assert torch.equal(ops.dropout(x, 0.5, 3, 4) != 0, keep)
    total = ops.add_layer_norm(x, torch.zeros_like(x), x[0], dropout_p=0.5, seed=3, offset=4)[1]
    assert torch.equal(total != 0, keep)


def test_half_a_unit_of_p_rounds_to_even():
    """2.5 / 65536 becomes 2: some of these elements would be dropped at 3."""
    p, seed, shape = 2.5 / 65536, 1, (1, 1000, 256)
    keep = ops.dropout_mask(shape, p, seed=seed)
    assert torch.equal(keep, rng.dropout_keep(shape, p, seed, 0))
    assert not torch.equal(keep, ops.dropout_mask(shape, 3 / 65536, seed=seed))
    q, v = torch.zeros(1, 1, 1000, 256), torch.eye(256)[None, None]
    out = ops.causal_attention(q, v * 0, v, causal=False, dropout_p=p, seed=seed)
    assert torch.equal(out[0] != 0, keep)


def test_dropping_everything_drops_nan(isa):
    x = torch.full((2, 9), float("nan"))
    assert (ops.dropout(x, 1.0) == 0).all()
    y = ops.dropout(x, 0.5, seed=3)
    assert torch.equal(y.isnan(), ops.dropout_mask((1, 2, 9), 0.5, seed=3)[0]) and (y[~y.isnan()] == 0).all()


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


def test_compiles():
    x = torch.randn(6, 16)
    check_compiles(lambda x: ops.dropout(x, 0.3, 2, 5) * 2, x)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.dropout(torch.ones(2), 1.1), ValueError, "dropout: p is 1.1; expected a probability"),
        (lambda: ops.dropout(torch.ones(2).long(), 0.1), TypeError, "dropout: x has dtype torch.int64"),
        (lambda: ops.dropout([1.0], 0.1), TypeError, "dropout: x is a list; expected a torch.Tensor"),
        (lambda: ops.dropout(torch.ones(2), 0.1, seed=-1), ValueError, "dropout: seed is -1"),
        (lambda: ops.dropout(torch.ones(2), 0.1, seed=True), TypeError, r"dropout: seed is True \(bool\)"),
        (lambda: ops.dropout(torch.ones(2), 0.1, offset=2**32), ValueError, "dropout: offset is 4294967296"),
        (lambda: ops.dropout_mask((2, 3), 0.1), ValueError, "dropout_mask: shape is"),
        (lambda: ops.dropout_mask((1, 2, -3), 0.1), ValueError, "dropout_mask: shape is"),
        (lambda: ops.dropout_mask((1, 2, 3), float("nan")), ValueError, "dropout_mask: p is nan"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
