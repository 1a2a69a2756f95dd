"""layer_norm and add_layer_norm: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import DTYPES, Case, cases, check_case, dtypes
from gptfast.testing.accuracy import assert_accurate
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("layer_norm") + cases("add_layer_norm")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.id}")
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("C", range(1, 67))
def test_every_tail_length(C, isa):
    x, w, b = torch.randn(3, C), torch.randn(C), torch.randn(C)
    for shift in (0, 1, 3):
        rows = torch.randn(3, C + shift)[:, shift:].copy_(x)
        expected = F.layer_norm(x.double(), (C,), w.double(), b.double()).float()
        torch.testing.assert_close(ops.layer_norm(rows, w, b), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("N", "C"), [(2, 2051), (3, 8200), (2, 12296), (3, 1024), (2, 1536), (2200, 8), (8300, 3)])
def test_long_rows_and_many_rows(N, C, dtype, isa):
    """Rows beyond the registers of a warp and of a block; more rows than there are parts of the sums over rows, and than
    these have warps."""
    check_case(Case("layer_norm", {"N": N, "C": C}), dtype)
    check_case(Case("add_layer_norm", {"N": N, "C": C}, {"dropout_p": 0.2, "seed": 3}), dtype)


def test_statistics_survive_a_large_mean(isa):
    """Two passes: the variance is not a difference of large numbers."""
    x = torch.randn(4, 768) + 3000.0
    expected = F.layer_norm(x.double(), (768,)).float()
    torch.testing.assert_close(ops.layer_norm(x, torch.ones(768)), expected, rtol=1e-3, atol=1e-3)


OFFSETS = [0.0, 14.1, 3000.0, 12345.678, 1e6, 1e7]
WIDTHS = [1, 2, 3, 15, 64, 257, 768, 1600]


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("C", WIDTHS)
def test_constant_rows_are_zero(C, eps, isa):
    """The mean of equal numbers is that number, whatever its sum was rounded to."""
    x = torch.tensor(OFFSETS)[:, None].expand(-1, C).contiguous().requires_grad_()
    w, b = torch.randn(C, requires_grad=True), torch.randn(C)
    for y in (ops.layer_norm(x, w, b, eps), ops.add_layer_norm(x, torch.zeros_like(x), w, b, eps)[0]):
        assert torch.equal(y, b.expand_as(y))
        dy = torch.randn_like(y)
        dx, dw = torch.autograd.grad(y, (x, w), dy)
        assert torch.equal(dw, torch.zeros_like(dw))
        g = dy.double() * w.detach()  # rounded to 2^-24 each: what is left of a difference of equals, times rstd
        wanted = (g - g.mean(-1, keepdim=True)) * eps**-0.5
        exact_alone = 0.0 if C == 1 and isa != "triton" else 1.0  # LLVM may fuse the product and the difference
        floor = exact_alone * 4e-7 * g.abs().max() * eps**-0.5
        assert (dx - wanted).abs().max() <= floor + 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("spread", [1.0, 1e-2])
@pytest.mark.parametrize("offset", OFFSETS)
def test_rows_far_from_zero(offset, spread, isa):
    """At most twice eager PyTorch's error in the results, three times in the gradients, wherever the mean lies."""
    for C in WIDTHS[1:]:
        x = torch.randn(64, C) * spread + offset
        case = (x, torch.randn(C), torch.randn(C))
        upstream = torch.randn(64, C)
        ours, eager, exact = (
            [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]
            for call, kind in ((ops.layer_norm, x.dtype), (reference.layer_norm, x.dtype), (by_torch, torch.double))
            for leaves in [[t.to(kind).detach().requires_grad_() for t in case]]
            for y in [call(*leaves)]
        )
        for n, (a, e, t) in enumerate(zip(ours, eager, exact, strict=True)):
            assert_accurate([a], [e], [t], 3 if n else 2, f"offset {offset} spread {spread} C {C}: {n}")


def by_torch(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


@pytest.mark.parametrize("C", [8, 264, 768, 1600, 2048])
@pytest.mark.parametrize("types", [("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_few_rows_have_the_bits_of_many(types, C, emu):
    """On a GPU a row of a decoding step has a block to itself, one of many rows a warp."""
    x, residual = (torch.randn(600, C).to(DTYPES[name]) for name in types)
    w, b = torch.randn(C).to(x.dtype), torch.randn(C)
    few = slice(100, 103)
    for options in ({}, {"dropout_p": 0.3, "seed": 5}):
        many = ops.add_layer_norm(x, residual, w, b, **options)
        some = ops.add_layer_norm(x[few], residual[few], w, b, **options, **({"first_row": 100} if options else {}))
        assert all(torch.equal(a[few], c) for a, c in zip(many, some, strict=True))
    assert torch.equal(ops.layer_norm(x, w)[few], ops.layer_norm(x[few], w))


def test_add_layer_norm_is_its_parts(isa):
    x, residual, w, b = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33), torch.randn(33)
    y, total = ops.add_layer_norm(x, residual, w, b, dropout_p=0.4, seed=9, offset=4)
    keep = ops.dropout_mask((1, 5, 33), 0.4, seed=9, offset=4)[0]
    p = round(0.4 * 65536) / 65536
    torch.testing.assert_close(total, x * keep / (1 - p) + residual, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, ops.layer_norm(total, w, b), rtol=0, atol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("types", [("bf16", "fp16"), ("fp16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_dtypes_of_the_stream(types, dropout_p, isa):
    """total and y take the promoted dtype; each gradient has its input's dtype and its input's rounding only."""
    x, residual = (torch.randn(67, 37).to(DTYPES[name]).requires_grad_() for name in types)
    w, b = (torch.randn(37, requires_grad=True) for _ in range(2))
    options = {"dropout_p": dropout_p, "seed": 5}
    y, total = ops.add_layer_norm(x, residual, w, b, **options)
    assert y.dtype == total.dtype == torch.promote_types(x.dtype, residual.dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, residual, w, b)]
    results = ops.add_layer_norm(*exact, **options)
    dy, dtotal = torch.randn(2, 67, 37).to(y.dtype)
    grads = torch.autograd.grad((y, total), (x, residual, w, b), (dy, dtotal))
    expected = torch.autograd.grad(results, exact, (dy.double(), dtotal.double()))
    assert [g.dtype for g in grads] == [x.dtype, residual.dtype, torch.float32, torch.float32]
    for got, e in zip((y, total, *grads), (*results, *expected), strict=True):
        eps = max(torch.finfo(got.dtype).eps, torch.finfo(y.dtype).eps)
        torch.testing.assert_close(got.double(), e, rtol=2 * eps, atol=8 * eps * e.abs().max().item())


@pytest.mark.parametrize("C", [5, 64, 2051, 8200])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("kind", DTYPES)
def test_a_result_is_rounded_once(kind, out, C, isa):
    """With out_dtype: the bits of the fp32 result and then `.to(out_dtype)`, forward and backward."""
    x, residual, dy, dtotal = (torch.randn(9, C).to(DTYPES[kind]) for _ in range(4))
    w, b = torch.randn(C), torch.randn(C)

    def results(first, last, add):
        leaves = [t.clone().requires_grad_() for t in ((x, residual, w, b) if add else (x, w, b))]
        y, *total = ops.add_layer_norm(*leaves, out_dtype=first) if add else (ops.layer_norm(*leaves, out_dtype=first),)
        outputs, upstream = [y.to(last), *total], [dy.to(last), dtotal][: 1 + add]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    for add in (False, True):
        once = results(DTYPES[out], DTYPES[out], add)
        wide = results(torch.float32, DTYPES[out], add)
        for n, (a, e) in enumerate(zip(once, wide, strict=True)):
            assert a.dtype == e.dtype and torch.equal(a, e), f"add {add}, tensor {n}"
        assert once[0].dtype == DTYPES[out] and once[-3].dtype == DTYPES[kind]


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_result_is_used(which):
    """The other's gradient is absent, not a tensor of zeros."""
    leaves = [t.requires_grad_() for t in (torch.randn(5, 8), torch.randn(5, 8), torch.randn(8), torch.randn(8))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    upstream = torch.randn(5, 8)
    grads = torch.autograd.grad(ops.add_layer_norm(*leaves)[which], leaves[:2], upstream)
    expected = torch.autograd.grad(ops.add_layer_norm(*exact)[which], exact[:2], upstream.double())
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6)


def test_higher_dimensions_and_views():
    x, w = torch.randn(2, 3, 5, 8), torch.randn(8)
    torch.testing.assert_close(ops.layer_norm(x, w), F.layer_norm(x, (8,), w), rtol=1e-5, atol=1e-6)
    turned = x.transpose(0, 2)  # no single stride between rows: copied
    torch.testing.assert_close(ops.layer_norm(turned, w), F.layer_norm(turned, (8,), w), rtol=1e-5, atol=1e-6)
    column = torch.randn(8, 4).T  # last dimension not contiguous
    torch.testing.assert_close(ops.layer_norm(column, w), F.layer_norm(column, (8,), w), rtol=1e-5, atol=1e-6)


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.float32)


def test_pure():
    for case in CASES:
        check_pure(case, torch.bfloat16)


def test_reference_gradcheck():
    x, r, w, b = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((3, 5), (3, 5), (5,), (5,)))
    torch.autograd.gradcheck(ops.layer_norm, (x, w, b))
    assert ops.layer_norm(x, w, b, out_dtype=torch.float32).dtype == torch.float32
    torch.autograd.gradcheck(lambda *a: ops.add_layer_norm(*a, dropout_p=0.3, seed=1), (x, r, w, b))


def test_compiles():
    x, w, b = torch.randn(6, 16), torch.randn(16), torch.randn(16)
    check_compiles(lambda x, w, b: ops.layer_norm(x, w, b) * 2, x, w, b)
    check_compiles(lambda w: ops.layer_norm(w, w, w), w)
    check_compiles(lambda x, w: ops.layer_norm(x, w, out_dtype=torch.bfloat16) * 2, x, w)
    check_compiles(lambda x, w: ops.add_layer_norm(x.half(), x, w, out_dtype=torch.float16)[0], x, w)
    check_compiles(lambda x, w, b: sum(ops.add_layer_norm(x, x, w, b, dropout_p=0.3, seed=2)), x, w, b)
    check_compiles(lambda x, w: ops.add_layer_norm(x, x * 2, w)[0], x, w)


def test_no_double_backward():
    w = torch.randn(8)
    check_no_double_backward(lambda x: ops.layer_norm(x, w), torch.randn(3, 8), "layer_norm: double backward")
    check_no_double_backward(lambda x: ops.add_layer_norm(x, x, w)[0], torch.randn(3, 8), "add_layer_norm: double")


X, W = torch.zeros(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.layer_norm(X.int(), W), TypeError, "layer_norm: x has dtype torch.int32"),
        (lambda: ops.layer_norm(X, W[:3]), ValueError, r"layer_norm: weight has shape \(3,\); expected \(4,\)"),
        (lambda: ops.layer_norm(X, W, W[:1]), ValueError, r"layer_norm: bias has shape \(1,\)"),
        (lambda: ops.layer_norm(X, W, eps=-1.0), ValueError, "layer_norm: eps is -1.0"),
        (lambda: ops.layer_norm(X, W, eps=float("nan")), ValueError, "layer_norm: eps is nan"),
        (
            lambda: ops.layer_norm(X, W, out_dtype="bf16"),
            TypeError,
            "layer_norm: out_dtype is 'bf16'; expected None or",
        ),
        (
            lambda: ops.add_layer_norm(X, X, W, out_dtype=torch.int32),
            TypeError,
            "add_layer_norm: out_dtype is torch.int32",
        ),
        (
            lambda: ops.layer_norm(X, W, out_dtype=torch.float64),
            TypeError,
            "out_dtype is torch.float64; .* torch.float32",
        ),
        (lambda: ops.layer_norm(X[:, :0], W[:0]), ValueError, r"x has shape \(2, 0\); expected \(..., C\)"),
        (lambda: ops.add_layer_norm(X, X[:1], W), ValueError, r"add_layer_norm: residual has shape \(1, 4\) but x has"),
        (lambda: ops.add_layer_norm(X, X, W, dropout_p=2.0), ValueError, "add_layer_norm: dropout_p is 2.0"),
        (lambda: ops.add_layer_norm(X, X, W, offset=-1), ValueError, "add_layer_norm: offset is -1"),
        (lambda: ops.add_layer_norm(X, X, W, seed=2**64), ValueError, "add_layer_norm: seed is"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
