"""cross_entropy, linear_cross_entropy and linear_logprobs: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

from gptfast import ops
from gptfast.testing import cases, check_case, dtypes

CASES = cases("cross_entropy") + cases("linear_cross_entropy")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.id}")
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("V", range(1, 40))
def test_every_tail_length(V, isa):
    logits, targets = torch.randn(4, V) * 5, torch.randint(V, (4,))
    expected = F.cross_entropy(logits.double(), targets).float()
    torch.testing.assert_close(ops.cross_entropy(logits, targets), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_torch(reduction, smoothing, isa):
    logits = (torch.randn(9, 300) * 4).requires_grad_()
    targets = torch.randint(300, (9,))
    targets[3] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours, theirs = ops.cross_entropy(logits, targets, **options), F.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.rand(theirs.shape)
    grads = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_masked_and_extreme_logits(isa):
    logits = torch.randn(4, 50)
    logits[:, 10:20] = float("-inf")
    logits[1, 0], logits[2, 0] = 1e4, -1e4
    logits.requires_grad_()
    targets = torch.tensor([0, 0, 0, 30])
    loss = ops.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad(loss.sum(), logits)
    assert g.isfinite().all() and (g[:, 10:20] == 0).all()
    assert ops.cross_entropy(logits[:1].detach(), torch.tensor([15])) == float("inf")
    assert ops.cross_entropy(torch.full((1, 3), float("nan")), torch.tensor([1])).isnan()


def test_nothing_counts():
    logits = torch.randn(3, 5, requires_grad=True)
    none = torch.full((3,), -100)
    assert ops.cross_entropy(logits, none).isnan() and F.cross_entropy(logits, none).isnan()
    assert ops.cross_entropy(logits, none, reduction="sum") == 0
    assert ops.linear_cross_entropy(logits, torch.randn(7, 5), none).isnan()


def test_rows_of_any_shape():
    logits, targets = torch.randn(2, 3, 4, 10), torch.randint(10, (2, 3, 4))
    per_row = ops.cross_entropy(logits, targets, reduction="none")
    assert per_row.shape == (2, 3, 4)
    expected = F.cross_entropy(logits.permute(0, 3, 1, 2), targets, reduction="none")
    torch.testing.assert_close(per_row, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_chunks_equal_one(reduction, monkeypatch):
    """16 rows a chunk, the last one ragged."""
    import sys

    leaves = [torch.randn(70, 24).requires_grad_(), (torch.randn(501, 24) / 5).requires_grad_()]
    targets = torch.randint(501, (70,))
    targets[::7] = -100
    results = []
    for chunk in (1, 1 << 26):
        monkeypatch.setattr(sys.modules["gptfast.ops.linear_cross_entropy"], "CHUNK_BYTES", chunk)
        loss = ops.linear_cross_entropy(*leaves, targets, reduction=reduction, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, leaves, torch.full(loss.shape, 0.7))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logprobs():
    hidden, weight, targets = torch.randn(2, 5, 8), torch.randn(30, 8, requires_grad=True), torch.randint(30, (2, 5))
    got = ops.linear_logprobs(hidden, weight, targets)
    expected = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)
    assert not got.requires_grad


def test_under_autocast():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
        expected = F.cross_entropy(F.linear(hidden, weight), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=2e-2, atol=2e-2)
    assert [g.dtype for g in torch.autograd.grad(loss, (hidden, weight))] == [torch.float32] * 2


def test_repeatable(threads):
    for case in cases("cross_entropy"):
        check_repeatable(case, torch.float32)
    for case in cases("linear_cross_entropy"):  # its products run in torch's GEMM, whose sums depend on the threads
        check_repeatable(case, torch.float32, thread_counts=(2, 2, 2))


def test_pure():
    for case in CASES:
        check_pure(case, torch.float32)


def test_reference_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, targets, label_smoothing=0.1), (logits,))
    torch.autograd.gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, targets), (logits, weight))


def test_compiles():
    logits, weight, targets = torch.randn(6, 16), torch.randn(9, 16), torch.randint(9, (6,))
    check_compiles(lambda x: ops.cross_entropy(x, targets, label_smoothing=0.1), logits)
    check_compiles(lambda x, w: ops.linear_cross_entropy(x, w, targets), logits, weight)
    check_compiles(lambda x, w: ops.linear_cross_entropy(x, w, targets, reduction="none").sum(), logits, weight)
    square = torch.randn(6, 6)
    check_compiles(lambda x: ops.linear_cross_entropy(x, x, torch.arange(6)), square)


def test_opcheck():
    logits, weight, targets = torch.randn(6, 16), torch.randn(9, 16), torch.randint(9, (6,))
    op, row = torch.ops.gptfast, torch.rand(6)
    torch.library.opcheck(op.cross_entropy_fwd.default, (logits, targets, -100, 0.1))
    torch.library.opcheck(op.cross_entropy_bwd.default, (row, logits, targets, row, -100, 0.1))
    torch.library.opcheck(op.linear_cross_entropy_fwd.default, (logits, weight, targets, -100, 0.1))
    torch.library.opcheck(op.linear_cross_entropy_bwd.default, (row, logits, weight, targets, -100, 0.1))


def test_no_double_backward():
    targets = torch.tensor([1, 2])
    check_no_double_backward(lambda x: ops.cross_entropy(x, targets) ** 2, torch.randn(2, 5), "cross_entropy: double")


X, T = torch.zeros(2, 4), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.cross_entropy(X.int(), T), TypeError, "cross_entropy: logits has dtype torch.int32"),
        (lambda: ops.cross_entropy(X, T.float()), TypeError, "cross_entropy: targets has dtype torch.float32"),
        (lambda: ops.cross_entropy(X, T[:1]), ValueError, r"targets has shape \(1,\); expected \(2,\)"),
        (lambda: ops.cross_entropy(X, T + 1), IndexError, r"a target is 4; expected 0 to 3, or ignore_index \(-100\)"),
        (lambda: ops.cross_entropy(X, -T), IndexError, "a target is -3"),
        (lambda: ops.cross_entropy(X, T, reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda: ops.cross_entropy(X, T, label_smoothing=1.5), ValueError, "label_smoothing is 1.5"),
        (lambda: ops.cross_entropy(X[:, :0], T), ValueError, r"logits has shape \(2, 0\)"),
        (
            lambda: ops.linear_cross_entropy(X, torch.zeros(9, 5), T),
            ValueError,
            r"hidden has shape \(2, 4\) and weight",
        ),
        (lambda: ops.linear_cross_entropy(X, torch.zeros(3, 4), T), IndexError, "a target is 3; expected 0 to 2"),
        (lambda: ops.linear_cross_entropy(X, X.half(), T), TypeError, "hidden is torch.float32 but weight is"),
        (
            lambda: torch.ops.gptfast.cross_entropy_fwd(X, T + 1, -100, 0.0),
            RuntimeError,
            r"cross_entropy: targets\[1\] is 4",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
