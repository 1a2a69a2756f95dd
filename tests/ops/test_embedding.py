"""embedding: values, gradients, ids outside the tables, errors."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import dtypes
from gptfast.testing.accuracy import assert_accurate
from tests.support.op_properties import bitwise, check_compiles, check_no_double_backward


def tables(dtype, V=11, P=9, C=24):
    return [torch.randn(n, C).to(dtype).requires_grad_() for n in (V, P)]


def results(f, tensors, dtype):
    """Result and gradients of f(*tensors), computed in this dtype."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in tensors]
    out = f(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(out.dtype)
    return [out.detach()], list(torch.autograd.grad(out, leaves, upstream))


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("C", [1, 7, 24, 1032, 2049])
@pytest.mark.parametrize("given", ["positions", "one row", "none"])
def test_parity(given, C, dtype, isa):
    ids = torch.randint(11, (3, 7))
    positions = {"positions": torch.randint(9, (3, 7)), "one row": torch.randperm(9)[:7], "none": None}[given]
    leaves = tables(dtype, C=C)
    ours, fine, exact = (
        results(lambda wte, wpe, f=f: f(ids, wte, wpe, positions), leaves, computed)
        for f, computed in (
            (ops.embedding, dtype),
            (reference.embedding, torch.float32),  # in bf16 eager would sum the gradient in bf16
            (reference.embedding, torch.float64),
        )
    )
    assert_accurate(ours[0], fine[0], exact[0], 2, "result")
    assert_accurate(ours[1], fine[1], exact[1], 3, "gradient")


def test_only_tokens(isa):
    wte = torch.randn(5, 8, requires_grad=True)
    ids = torch.tensor([4, 0, 4, 4], dtype=torch.int32)
    out = ops.embedding(ids, wte)
    assert torch.equal(out, wte[ids.long()])
    (g,) = torch.autograd.grad(out.sum(), wte)
    assert torch.equal(g[:, 0], torch.tensor([1.0, 0, 0, 0, 3]))


def test_a_frozen_table_gets_no_gradient(isa):
    wte, wpe = (t.detach() for t in tables(torch.float32))
    ids = torch.randint(11, (2, 5))
    out = ops.embedding(ids, wte, wpe.requires_grad_())
    out.sum().backward()
    assert wte.grad is None and torch.equal(wpe.grad[:, 0], torch.tensor([2.0] * 5 + [0.0] * 4))


def test_long_runs_repeat_bit_for_bit(isa):
    """A frequent token: the sum of its many rows has one order, and fp32 precision in every dtype."""
    wte, ids = torch.zeros(3, 16, dtype=torch.bfloat16, requires_grad=True), torch.randint(2, (1, 3000))
    upstream = torch.randn(1, 3000, 16).bfloat16()
    first, again = (torch.autograd.grad(ops.embedding(ids, wte), wte, upstream)[0] for _ in range(2))
    assert bitwise(first, again)
    exact = torch.stack([upstream[ids == n].double().sum(0) for n in range(3)])
    torch.testing.assert_close(first.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("C", [5, 16])
@pytest.mark.parametrize(
    "runs",
    [[1100], [256, 256, 3], [255, 1, 257], [100, 700, 5, 300], [40, 31, 32, 33, 64, 1, 512], [257], [512, 1]],
    ids=lambda runs: "_".join(map(str, runs)),
)
def test_runs_of_equal_ids(runs, C, isa):
    """The sum of a run, in pieces where it goes over the end of a segment of 256 sorted ids, and of batches of 8 and 32 rows."""
    ids = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(5))]
    wte = torch.zeros(len(runs) + 1, C, requires_grad=True)
    upstream = torch.randint(-99, 100, (len(ids), C)).float()  # whole numbers: their sums are exact in any order
    (g,) = torch.autograd.grad(ops.embedding(ids, wte), wte, upstream)
    assert torch.equal(g, torch.zeros(wte.shape).index_add(0, ids, upstream))


def test_empty_and_strided(isa):
    wte = torch.randn(5, 20)[:, 3:11]
    assert ops.embedding(torch.zeros(0, 4, dtype=torch.int64), wte).shape == (0, 4, 8)
    ids = torch.tensor([[1, 2], [3, 4]]).T
    assert torch.equal(ops.embedding(ids, wte), wte[ids])


def test_compiles():
    ids = torch.randint(11, (2, 5))
    wte, wpe = (t.detach() for t in tables(torch.float32))
    check_compiles(lambda a, b: ops.embedding(ids, a, b) * 2, wte, wpe)


def test_compiles_on_cuda(emu):
    test_compiles()


def test_no_double_backward(isa):
    ids = torch.randint(11, (2, 5))
    match = "embedding: double backward is not implemented"
    check_no_double_backward(lambda w: ops.embedding(ids, w) ** 2, torch.randn(11, 8), match)


def test_ids_outside_the_table(emu):
    """On a GPU checking the ids would wait for them: such rows are nan instead, and train nothing."""
    wte = torch.randn(5, 8, requires_grad=True)
    out = ops.embedding(torch.tensor([1, 5, -1]), wte)
    assert out[0].isfinite().all() and out[1:].isnan().all()
    (g,) = torch.autograd.grad(out, wte, torch.ones(3, 8))
    assert torch.equal(g[:, 0], torch.tensor([0.0, 1, 0, 0, 0]))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda w: ops.embedding(torch.ones(2), w), TypeError, "embedding: ids has dtype torch.float32"),
        (lambda w: ops.embedding(torch.zeros(1, 6).long(), w, w), ValueError, "ids has 6 positions but wpe has 5 rows"),
        (lambda w: ops.embedding(torch.tensor([9]), w), IndexError, "ids holds 9; expected 0 to 4"),
        (lambda w: ops.embedding(torch.tensor([1]), w, w, torch.tensor([-1])), IndexError, "positions holds -1"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.randn(5, 8))
