"""rms_norm and add_rms_norm: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops
from gptfast.testing import DTYPES, cases, check_case, dtypes
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("rms_norm") + cases("add_rms_norm")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.id}")
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("C", range(1, 67))
def test_every_tail_length(C, isa):
    x, w = torch.randn(3, C), torch.randn(C)
    for shift in (0, 1, 3):
        rows = torch.randn(3, C + shift)[:, shift:].copy_(x)
        expected = F.rms_norm(x.double(), (C,), w.double(), 1e-6).float()
        torch.testing.assert_close(ops.rms_norm(rows, w), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("C", [8, 128, 768, 2048])
@pytest.mark.parametrize("types", [("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32")])
def test_few_rows_have_the_bits_of_many(types, C, emu):
    """On a GPU a row of a decoding step has a block to itself, one of many rows a warp or part of one."""
    x, residual = (torch.randn(600, C).to(DTYPES[name]) for name in types)
    few = slice(100, 103)
    for w in (torch.randn(C), torch.randn(C).bfloat16(), None):
        many = ops.add_rms_norm(x, residual, w, dropout_p=0.3, seed=5)
        some = ops.add_rms_norm(x[few], residual[few], w, dropout_p=0.3, seed=5, first_row=100)
        assert all(torch.equal(a[few], c) for a, c in zip(many, some, strict=True))
        assert torch.equal(ops.rms_norm(x, w)[few], ops.rms_norm(x[few], w))


def test_add_rms_norm_is_its_parts(isa):
    x, residual, w = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    y, total = ops.add_rms_norm(x, residual, w, dropout_p=0.4, seed=9, offset=4)
    keep = ops.dropout_mask((1, 5, 33), 0.4, seed=9, offset=4)[0]
    p = round(0.4 * 65536) / 65536
    torch.testing.assert_close(total, x * keep / (1 - p) + residual, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, ops.rms_norm(total, w), rtol=0, atol=0)
    part = ops.add_rms_norm(x[2:], residual[2:], w, dropout_p=0.4, seed=9, offset=4, first_row=2)
    assert torch.equal(part[0], y[2:]) and torch.equal(part[1], total[2:])


@pytest.mark.parametrize("module", ["gpt_oss.modeling_gpt_oss.GptOssRMSNorm", "llama.modeling_llama.LlamaRMSNorm"])
def test_the_modules_of_transformers(module):
    """gpt-oss' to the rounding of its dtype. Llama's rounds before the weight too: half a unit of x / rms, times weight."""
    path, name = module.rsplit(".", 1)
    models = pytest.importorskip(f"transformers.models.{path}")
    theirs = getattr(models, name)(96, eps=1e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w, x = torch.rand(96) + 0.5, torch.randn(40, 96).to(dtype)
        theirs.weight.data = w if "Oss" in name else w.to(dtype)
        expected, got = theirs(x), ops.rms_norm(x, theirs.weight, 1e-5)
        eps = torch.finfo(dtype).eps
        assert got.dtype == expected.dtype == dtype
        torch.testing.assert_close(
            got, expected, rtol=eps if "Oss" in name or dtype == torch.float32 else 2 * eps, atol=1e-6
        )


def test_as_torch_has_it():
    """In 16 bits the bits of F.rms_norm, which rounds once too, but for sums in another order."""
    x, w = torch.randn(64, 200).bfloat16(), torch.randn(200).bfloat16()
    ours, theirs = ops.rms_norm(x, w, 1e-6), F.rms_norm(x, (200,), w, 1e-6)
    assert (ours != theirs).float().mean() < 2e-3
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_result_is_used(which):
    """The other's gradient is absent, not a tensor of zeros."""
    leaves = [t.requires_grad_() for t in (torch.randn(5, 8), torch.randn(5, 8), torch.randn(8))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    upstream = torch.randn(5, 8)
    grads = torch.autograd.grad(ops.add_rms_norm(*leaves)[which], leaves[:2], upstream)
    expected = torch.autograd.grad(ops.add_rms_norm(*exact)[which], exact[:2], upstream.double())
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("C", [5, 64, 2051])
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("kind", DTYPES)
def test_a_result_is_rounded_once(kind, out, C, weighted, isa):
    """With out_dtype: the bits of the fp32 result and then `.to(out_dtype)`, forward and backward."""
    x, residual, dy, dtotal = (torch.randn(9, C).to(DTYPES[kind]) for _ in range(4))
    w = torch.randn(C) if weighted else None

    def results(first, last, add):
        tensors = (x, residual, w) if add else (x, w)
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        y, *total = ops.add_rms_norm(*leaves, out_dtype=first) if add else (ops.rms_norm(*leaves, out_dtype=first),)
        outputs, upstream = [y.to(last), *total], [dy.to(last), dtotal][: 1 + add]
        return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], upstream)]

    for add in (False, True):
        once = results(DTYPES[out], DTYPES[out], add)
        wide = results(torch.float32, DTYPES[out], add)
        for n, (a, e) in enumerate(zip(once, wide, strict=True)):
            assert a.dtype == e.dtype and torch.equal(a, e), f"add {add}, tensor {n}"
        assert once[0].dtype == DTYPES[out]


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.float32)


def test_pure():
    for case in CASES:
        check_pure(case, torch.bfloat16)


def test_reference_gradcheck():
    x, r, w = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((3, 5), (3, 5), (5,)))
    torch.autograd.gradcheck(ops.rms_norm, (x, w))
    torch.autograd.gradcheck(lambda x: ops.rms_norm(x, eps=0.1), (x,))
    torch.autograd.gradcheck(lambda *a: ops.add_rms_norm(*a, dropout_p=0.3, seed=1), (x, r, w))


def test_compiles():
    x, w = torch.randn(6, 16), torch.randn(16)
    check_compiles(lambda x, w: ops.rms_norm(x, w) * 2, x, w)
    check_compiles(lambda w: ops.rms_norm(w, w), w)
    check_compiles(lambda x: ops.rms_norm(x, out_dtype=torch.bfloat16) * 2, x)
    check_compiles(lambda x, w: sum(ops.add_rms_norm(x, x, w, dropout_p=0.3, seed=2)), x, w)
    check_compiles(lambda x, w: ops.add_rms_norm(x.half(), x, w, out_dtype=torch.float16)[0], x, w)


def test_no_double_backward():
    w = torch.randn(8)
    check_no_double_backward(lambda x: ops.rms_norm(x, w), torch.randn(3, 8), "rms_norm: double backward")
    check_no_double_backward(lambda x: ops.add_rms_norm(x, x)[0], torch.randn(3, 8), "add_rms_norm: double")


X, W = torch.zeros(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.rms_norm(X.int(), W), TypeError, "rms_norm: x has dtype torch.int32"),
        (lambda: ops.rms_norm(X, W[:3]), ValueError, r"rms_norm: weight has shape \(3,\); expected \(4,\)"),
        (lambda: ops.rms_norm(X, eps=-1.0), ValueError, "rms_norm: eps is -1.0; expected a finite number >= 0"),
        (lambda: ops.rms_norm(X, W, out_dtype="bf16"), TypeError, "rms_norm: out_dtype is 'bf16'; expected None or"),
        (
            lambda: ops.rms_norm(X, W.to("meta")),
            ValueError,
            "rms_norm: all tensors must be on one device, got x on cpu",
        ),
        (lambda: ops.rms_norm(X[:, :0]), ValueError, r"rms_norm: x has shape \(2, 0\); expected \(..., C\)"),
        (lambda: ops.add_rms_norm(X, X[:1], W), ValueError, r"add_rms_norm: residual has shape \(1, 4\) but x has"),
        (lambda: ops.add_rms_norm(X, None, W), TypeError, "add_rms_norm: residual is a NoneType"),
        (lambda: ops.add_rms_norm(X, X, W, dropout_p=2.0), ValueError, "add_rms_norm: dropout_p is 2.0"),
        (lambda: ops.add_rms_norm(X, X, W, seed=2**64), ValueError, "add_rms_norm: seed is"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
