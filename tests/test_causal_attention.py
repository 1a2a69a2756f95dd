"""causal_attention: parity on every ISA, visibility rules, dropout, and the properties of an op."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

from gptfast import ops, rng
from gptfast.accuracy import assert_accurate
from gptfast.ops import reference
from gptfast.ops.causal_attention import causal_attention
from gptfast.testing import Case, cases, check_case, dtypes, run

CASES = cases("causal_attention")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype, seed=1)


@pytest.mark.parametrize("dtype", dtypes())
def test_lse(dtype, isa):
    """The returned log-sum-exp; with bf16 products exp is a polynomial of relative error 2.6e-6 (measured 3.0e-6)."""
    case = Case("causal_attention", {"B": 2, "H": 2, "T": 70, "D": 33}, {"return_lse": True, "window": 40})
    ours, eager = run(ops.causal_attention, case, dtype), run(reference.causal_attention, case, dtype)
    exact = run(reference.causal_attention, case, dtype, widen=torch.float64)
    floor = 3e-6 / torch.finfo(torch.float32).eps if dtype == torch.bfloat16 else 0.0
    assert_accurate(ours.outputs[1:], eager.outputs[1:], exact.outputs[1:], 2, "lse", floor=floor)


@pytest.mark.parametrize("T", [*range(1, 20), 31, 33, 47, 63, 64, 65, 127, 129])
def test_every_tail_length(T, isa):
    q, k, v = torch.randn(3, 1, 2, T, 20)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(ops.causal_attention(q, k, v).double(), expected, rtol=1e-6, atol=1e-6)


def test_equals_sdpa_for_every_head_dim(isa):
    for D in [*range(1, 35), 63, 64, 65, 96, 128, 255, 256]:
        q, k, v = torch.randn(3, 1, 1, 21, D)
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        torch.testing.assert_close(ops.causal_attention(q, k, v).double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", dtypes())
def test_dropout_uses_the_contract_mask(dtype, isa):
    B, H, T, D, p, seed, offset = 2, 3, 70, 32, 0.25, 2**40 + 17, 5
    q, k, v = torch.randn(3, B, H, T, D).to(dtype)
    out = ops.causal_attention(q, k, v, dropout_p=p, seed=seed, offset=offset)
    keep = rng.dropout_keep((B * H, T, T), p, seed, offset).view(B, H, T, T)
    scores = (q.double() @ k.double().transpose(-1, -2) * D**-0.5).masked_fill(
        ~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf")
    )
    expected = (scores.softmax(-1) * keep * rng.dropout_scale(p)) @ v.double()
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_masked_never_leaks(dtype, bad, isa):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 2, 100, 24).to(dtype).unbind())
    with torch.no_grad():
        k[0, :, 70:] = v[0, :, 70:] = k[1, :, 30:] = v[1, :, 30:] = bad
    out = ops.causal_attention(q, k, v, seq_lens=torch.tensor([70, 30]))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert (grads[1][0, :, 70:] == 0).all() and (grads[2][1, :, 30:] == 0).all()
    causal = ops.causal_attention(q, k, v)  # only the mask of each query keeps the bad keys away
    assert causal[0, :, :70].isfinite().all() and causal[1, :, :30].isfinite().all()
    assert not causal[0, :, 70:].isfinite().any()


def test_masked_gradient_of_queries_never_leaks(isa):
    """A bad key that later queries see, but that the queries in the loss do not."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 40, 16).unbind())
    with torch.no_grad():
        k[..., 33, :] = float("nan")
    (dq,) = torch.autograd.grad(ops.causal_attention(q, k, v)[..., :33, :].sum(), q)
    assert dq[..., :33, :].isfinite().all()


def test_empty_rows(isa):
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 1, 9, 8).unbind())
    out, lse = ops.causal_attention(q, k, v, seq_lens=torch.tensor([9, 0]), return_lse=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out[1] == 0).all() and lse[1].eq(float("-inf")).all() and lse[0].isfinite().all()
    assert all((g[1] == 0).all() and (g[0] != 0).any() for g in grads)


def test_cached_keys_equal_the_full_call(isa):
    """The last queries against all keys give the last rows of the whole attention."""
    q, k, v = torch.randn(3, 2, 3, 50, 16)
    full = ops.causal_attention(q, k, v)
    for T in (1, 7, 50):
        torch.testing.assert_close(ops.causal_attention(q[:, :, -T:], k, v), full[:, :, -T:], rtol=1e-5, atol=1e-6)


def test_packed_documents_equal_single_ones(isa):
    cu = torch.tensor([0, 20, 21, 90], dtype=torch.int32)
    q, k, v = torch.randn(3, 1, 2, 90, 16)
    packed = ops.causal_attention(q, k, v, cu_seqlens=cu)
    for a, b in pairwise(cu.tolist()):
        alone = ops.causal_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-5, atol=1e-6)


def test_window_of_one_returns_the_values(isa):
    q, k, v = torch.randn(3, 1, 2, 33, 8)
    torch.testing.assert_close(ops.causal_attention(q, k, v, window=1), v, rtol=1e-6, atol=1e-6)


def test_output_layout():
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    out = ops.causal_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


def test_large_scores_do_not_overflow(isa):
    q, k, v = torch.randn(3, 1, 1, 40, 16) * 200
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(ops.causal_attention(q, k, v).double(), expected, rtol=1e-3, atol=1e-1)


FEW_HEADS = [  # the backward deals the query blocks of each head to several slices
    Case("causal_attention", {"B": 1, "H": 2, "T": 600, "D": 20}, {"dropout_p": 0.1, "seed": 3}),
    Case("causal_attention", {"B": 1, "H": 1, "T": 515, "S": 707, "D": 9}, {"window": 300}),
]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", FEW_HEADS, ids=lambda c: c.id)
def test_few_heads(case, dtype, isa):
    check_case(case, dtype, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FEW_HEADS, ids=lambda c: c.id)
def test_few_heads_are_repeatable(case, dtype, threads):
    check_repeatable(case, dtype)


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.bfloat16)


def test_pure():
    for case in CASES:
        check_pure(case, torch.float32)


def test_under_autocast():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8).unbind())
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.causal_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


def test_reference_gradcheck():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 6, 4, dtype=torch.float64).unbind())
    options = {"window": 4, "dropout_p": 0.3, "seed": 1}
    torch.autograd.gradcheck(lambda q, k, v: ops.causal_attention(q, k, v, **options), (q, k, v))


def test_compiles():
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    options = {"dropout_p": 0.2, "seed": 2**64 - 1, "offset": 3, "window": 7}
    check_compiles(lambda q, k, v: ops.causal_attention(q, k, v, **options) * 2, q, k, v)
    check_compiles(lambda x: ops.causal_attention(x, x, x), q)


def test_opcheck():
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    options = (None, None, True, 0.3, 0.1, 5, 6, 0)
    op = torch.ops.gptfast
    torch.library.opcheck(op.causal_attention_fwd.default, (q, k, v, *options))
    out, lse = op.causal_attention_fwd(q, k, v, *options)
    torch.library.opcheck(op.causal_attention_bwd.default, (q, q, k, v, out, lse, *options))


def test_no_double_backward():
    k = torch.randn(1, 1, 4, 8)
    check_no_double_backward(lambda q: ops.causal_attention(q, k, k), k, "causal_attention: double backward")


X = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: causal_attention(X[0], X, X), ValueError, r"q has shape \(3, 5, 8\); expected \(B, H, T, D\)"),
        (lambda: causal_attention(X, X[..., :4], X[..., :4]), ValueError, r"k has head_dim 4 but q has 8"),
        (lambda: causal_attention(X, X[:, :1], X[:, :1]), ValueError, r"k has batch and heads \(2, 1\) but q"),
        (lambda: causal_attention(X, X, X[:, :, :4]), ValueError, r"k has shape .* and v .* expected equal"),
        (lambda: causal_attention(X, X.half(), X), TypeError, r"dtypes torch.float32, torch.float16"),
        (lambda: causal_attention(X, X.int(), X), TypeError, r"k has dtype torch.int32"),
        (lambda: causal_attention(*[torch.zeros(1, 1, 2, 257)] * 3), ValueError, r"head_dim is 257; expected 1 to 256"),
        (lambda: causal_attention(X, X, X, dropout_p=1.5), ValueError, r"dropout_p is 1.5; expected a probability"),
        (lambda: causal_attention(X, X, X, dropout_p=float("nan")), ValueError, r"dropout_p is nan"),
        (lambda: causal_attention(X, X, X, seed=-1), ValueError, r"seed is -1; expected 0 <= seed < 2\*\*64"),
        (lambda: causal_attention(X, X, X, seed=1.0), TypeError, r"seed is 1.0 \(float\); expected a Python int"),
        (lambda: causal_attention(X, X, X, offset=2**32), ValueError, r"offset is 4294967296"),
        (lambda: causal_attention(X, X, X, window=0), ValueError, r"window is 0"),
        (lambda: causal_attention(X, X, X, window=2, causal=False), ValueError, r"causal=False"),
        (lambda: causal_attention(X, X, X, seq_lens=torch.tensor([1])), ValueError, r"seq_lens has 1 entries"),
        (
            lambda: causal_attention(X, X, X, seq_lens=torch.ones(2)),
            TypeError,
            r"seq_lens has .*float32; expected a vector",
        ),
        (lambda: causal_attention(X, X, X, seq_lens=torch.tensor([1, 6])), RuntimeError, r"seq_lens\[1\] is 6"),
        (lambda: causal_attention(X, X, X, cu_seqlens=torch.tensor([0, 5])), ValueError, r"B = 1 and T = S; got B = 2"),
        (
            lambda: causal_attention(*[X[:1]] * 3, cu_seqlens=torch.tensor([0, 4, 2])),
            RuntimeError,
            r"cu_seqlens\[2\] is 2, less than",
        ),
        (lambda: causal_attention(X, X, X, softmax_scale=float("nan")), ValueError, r"softmax_scale is nan"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_auto_hands_over_what_torch_measured_faster(monkeypatch):
    """By the table, by `auto` only, and only calls that mean the same."""
    table = sys.modules["gptfast.ops.handed_over"]
    calls = []
    monkeypatch.setattr(table, "gpu_name", lambda device: "NVIDIA H200")
    run = table.run
    monkeypatch.setattr(table, "run", lambda *args: calls.append(1) or run(*args))
    q, k, v = torch.randn(3, 1, 2, 40, 16).bfloat16().unbind()

    def handed_over(*args, **options) -> bool:
        calls.clear()
        got, wanted = (ops.causal_attention(*args, **options, backend=name) for name in ("auto", "eager"))
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
        return bool(calls)

    assert not handed_over(q, k, v)  # an empty table
    monkeypatch.setattr(table, "FASTER", {("H200", 16): range(32, 64)})
    assert handed_over(q, k, v) and handed_over(q, k, v, causal=False, softmax_scale=0.1)
    for inputs in ((q[..., :20, :], k, v), (q.float(), k.float(), v.float()), (q[..., :8], k[..., :8], v[..., :8])):
        assert not handed_over(*inputs)
    for options in ({"window": 5}, {"seq_lens": torch.tensor([30])}, {"dropout_p": 0.5, "seed": 3}):
        assert not handed_over(q, k, v, **options)
    ops.causal_attention(q, k, v, backend="cpu")
    assert not calls
    assert not handed_over(q.clone().requires_grad_(), k, v)
    with torch.no_grad():
        assert handed_over(q.clone().requires_grad_(), k, v)
