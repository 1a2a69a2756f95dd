"""causal_attention: parity on every ISA, visibility rules, dropout, and the properties of an op."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops, rng
from gptfast.ops import reference
from gptfast.ops.causal_attention import causal_attention
from gptfast.testing import SPECS, Case, cases, check_case, dtypes, run
from gptfast.testing.accuracy import assert_accurate
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

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


def skip_in_the_interpreter(isa: str, dtype: torch.dtype) -> None:
    if isa == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds to bfloat16 wrongly")


def scored(scores: int, T: int = 64, D: int = 64, **options: Any) -> Case:
    dims = {"B": 1, "H": 2, "T": T, "S": options.pop("S", T), "D": D, "scores": scores}
    return Case("causal_attention", dims, options)


LARGE_SCORES = [  # the largest are some four times that
    *(scored(n) for n in (10, 30, 100, 1000, 10_000, 100_000)),
    scored(20, T=200, dropout_p=0.1, seed=3),  # rows near and far from 0 side by side
    scored(300, T=150, D=80, window=70),
    scored(1000, T=5, S=600),
]


# Errors of scores, which large ones make seen: products rounded before they are added; three tf32 products for one of fp32.
COARSER = {"scalar": 2, "emu": 2}


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", LARGE_SCORES, ids=lambda c: c.id)
def test_large_scores(case, dtype, isa):
    """Results and dv as exact as ever. dq and dk are products of dP - delta, which rounds apart, with large keys and
    queries: delta comes from the result as it was rounded, in fp32 on a CPU in dP's order, on GPUs in another one."""
    skip_in_the_interpreter(isa, dtype)
    eager, exact = (
        run(reference.causal_attention, case, dtype),
        run(reference.causal_attention, case, dtype, widen=torch.float64),
    )
    fine = run(reference.causal_attention, case, dtype, widen=torch.float32)
    ours = run(ops.causal_attention, case, dtype)
    stated = SPECS["causal_attention"].floors.get(dtype, (0.0, 0.0))
    for name, n, factor, floor in (("outputs", 0, 2, stated[0]), ("grads", 2, 3, stated[1])):
        one = [getattr(r, name)[n : n + 1] for r in (ours, eager, exact, fine)]
        assert_accurate(
            *one[:3], factor * COARSER.get(isa, 1), f"{name} {n}", fine=one[3], floor=floor, least=exact.upstream
        )
    q, k, v = (x.double() for x in case.inputs(dtype))
    on_gpu = isa in ("emu", "triton")
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6 if on_gpu else 2**-24
    size = exact.upstream * v.norm(dim=-1).max() * case.dims["D"] ** -0.5
    for n, other in ((0, k), (1, q)):
        error, theirs = ((r.grads[n] - exact.grads[n]).abs().max() for r in (ours, eager))
        assert error <= 3 * theirs + 5e-7 * exact.grads[n].abs().max() + unit * size * other.abs().max()


MAGNITUDES = {
    torch.float32: (1e2, 1e5, 1e6, 1e9, 1e15, 1e18),
    torch.bfloat16: (1e2, 1e5, 1e6, 1e9, 1e18),
    torch.float16: (60e3,),
}


@pytest.mark.parametrize("shape", [(40, 40, 1), (70, 70, 48), (70, 70, 64), (1, 600, 64)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "size"), [(d, size) for d, sizes in MAGNITUDES.items() for size in sizes])
def test_equal_scores_of_any_size(dtype, size, sign, shape, isa):
    """Weights of 1 / keys up to the largest finite scores, and gradients as exact as eager PyTorch's."""
    skip_in_the_interpreter(isa, dtype)
    T, S, D = shape
    leaves = torch.full((1, 2, T, D), size), torch.full((1, 2, S, D), size * sign), torch.randn(1, 2, S, D)
    upstream = torch.randn(1, 2, T, D)

    def results(call: Callable[..., Any], kind: torch.dtype, shrink: float = 1.0) -> list[torch.Tensor]:
        """With shrink: of queries that are so much smaller, and from these what the whole queries have."""
        q, k, v = (x.to(dtype).to(kind) for x in leaves)
        inputs = [x.requires_grad_() for x in (q * shrink, k, v)]
        out, lse = call(*inputs, return_lse=True)
        dq, dk, dv = torch.autograd.grad(out, inputs, upstream.to(dtype).to(kind))
        if shrink != 1:
            lse, dk = lse + (1 - shrink) * (q[0, 0, 0] @ k[0, 0, 0]).item() * D**-0.5, dk / shrink
        return [out.detach(), lse.detach(), dq, dk, dv]

    eps = max(torch.finfo(dtype).eps, 2.4e-7)  # the sum of 64 equal products, one after another, is off by 7e-7
    ours = results(ops.causal_attention, dtype)
    # Small scores: MKL adds up some rows in another order, which makes equal scores of 1e30 differ by 1e14.
    exact = results(reference.causal_attention, torch.float64, shrink=size**-2)
    # out, lse, dq, dk, dv; dq and dk: sums of products with keys or queries of this size, which cancel
    for got, wanted, least in zip(ours, exact, (1.0, 1.0, 4 * size, 4 * size, 1.0), strict=True):
        kind_eps = 2.4e-7 if got is ours[1] else eps
        coarse = dtype == torch.bfloat16 or isa == "emu"  # as test_lse; tf32 products of 22 bits
        floor = 3e-6 if got is ours[1] and coarse else 0.0
        torch.testing.assert_close(got.double(), wanted, rtol=4 * kind_eps + floor, atol=4 * kind_eps * least + floor)


@pytest.mark.parametrize("size", [1e10, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_score_wins(dtype, size, isa):
    """Among scores that differ by little but are large, and all other gradients are 0."""
    skip_in_the_interpreter(isa, dtype)
    q, v = torch.full((1, 1, 1, 1), size, dtype=dtype, requires_grad=True), torch.randn(1, 1, 50, 1).to(dtype)
    v.requires_grad_()
    k = torch.full((1, 1, 50, 1), size, dtype=dtype)
    k[0, 0, 33] *= 1 + max(2**-18, torch.finfo(dtype).eps)
    k.requires_grad_()
    out = ops.causal_attention(q, k, v)
    assert out.item() == v[0, 0, 33].item()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert (dq == 0).all() and (dk == 0).all() and dv.flatten().tolist() == [float(n == 33) for n in range(50)]


FEW_HEADS = [  # the backward deals the query blocks of each head to several slices
    Case("causal_attention", {"B": 1, "H": 2, "T": 600, "D": 20}, {"dropout_p": 0.1, "seed": 3}),
    Case("causal_attention", {"B": 1, "H": 1, "T": 515, "S": 707, "D": 9}, {"window": 300}),
    Case("causal_attention", {"B": 1, "H": 6, "T": 180, "D": 20, "K": 1}, {"enable_gqa": True, "dropout_p": 0.1}),
]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", FEW_HEADS, ids=lambda c: c.id)
def test_few_heads(case, dtype, isa):
    if isa == "emu":
        pytest.skip("no slices on a GPU; test_emulator_attention has its long rows")
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


def test_no_double_backward():
    k = torch.randn(1, 1, 4, 8)
    check_no_double_backward(lambda q: ops.causal_attention(q, k, k), k, "causal_attention: double backward")


X = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: causal_attention(X[0], X, X), ValueError, r"q has shape \(3, 5, 8\); expected \(B, H, T, D\)"),
        (lambda: causal_attention(X, X[..., :4], X[..., :4]), ValueError, r"k has head_dim 4 but q has 8"),
        (lambda: causal_attention(X, X[:, :1], X[:, :1]), ValueError, r"k has 1 heads but q has 3"),
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
        (lambda: causal_attention(X, X, X, seq_lens=torch.tensor([1, 6])), ValueError, r"seq_lens\[1\] is 6"),
        (lambda: causal_attention(X, X, X, cu_seqlens=torch.tensor([0, 5])), ValueError, r"B = 1 and T = S; got B = 2"),
        (lambda: causal_attention(X, X, X, softmax_scale=float("nan")), ValueError, r"softmax_scale is nan"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


WRONG_LENGTHS = [
    ({"cu_seqlens": [2, 5]}, r"cu_seqlens starts at 2; expected offsets that rise from 0 to T = 5"),
    ({"cu_seqlens": [3, 2]}, r"cu_seqlens starts at 3"),
    ({"cu_seqlens": [5]}, r"cu_seqlens starts at 5"),
    ({"cu_seqlens": [0]}, r"cu_seqlens ends at 0; expected offsets that rise from 0 to T = 5"),
    ({"cu_seqlens": [0, 3]}, r"cu_seqlens ends at 3"),
    ({"cu_seqlens": [0, 6]}, r"cu_seqlens ends at 6"),
    ({"cu_seqlens": [0, 4, 2, 5]}, r"cu_seqlens\[2\] is 2, less than the 4 before it"),
    ({"cu_seqlens": [0, -1, 5]}, r"cu_seqlens\[1\] is -1, less than the 0 before it"),
    ({"cu_seqlens": []}, r"cu_seqlens is empty"),
    ({"seq_lens": [6]}, r"seq_lens\[0\] is 6; expected 0 to S = 5"),
    ({"seq_lens": [-1]}, r"seq_lens\[0\] is -1"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("lengths", "match"), WRONG_LENGTHS)
def test_wrong_lengths_are_refused(lengths, match, dtype, isa):
    tensors = {name: torch.tensor(values, dtype=dtype) for name, values in lengths.items()}
    for backend in ("auto", "eager"):
        for x in (X[:1], X[:1].double()):
            with pytest.raises(ValueError, match=match):
                causal_attention(x, x, x, **tensors, backend=backend)


@pytest.mark.parametrize(("lengths", "match"), WRONG_LENGTHS)
def test_wrong_lengths_are_refused_below_python(lengths, match):
    """As torch.compile calls the op."""
    tensors = [
        torch.tensor(lengths[n], dtype=torch.int32) if n in lengths else None for n in ("seq_lens", "cu_seqlens")
    ]
    with pytest.raises(RuntimeError, match=r"cu_seqlens|seq_lens"):
        torch.ops.gptfast.causal_attention_fwd(X[:1], X[:1], X[:1], *tensors, True, 0.3, 0.0, 0, 0, 0)


def test_lengths_on_a_gpu_are_read_once(monkeypatch):
    """Until they change, and never while a CUDA graph is captured: each reading waits for the GPU."""
    module, read = sys.modules["gptfast.ops._attention_checks"], []
    lengths = torch.tensor([0, 3, 5])

    def look(lengths: torch.Tensor, limit: int = 5) -> None:
        module._check_once(lengths, limit, check)

    def check(values: list[int], limit: int) -> None:
        read.append(values)
        module._check_cu_seqlens(values, limit)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    look(lengths), look(lengths)
    assert read == [[0, 3, 5]]
    lengths[1] = 9
    for _ in range(2):  # what was found wrong is looked at again
        with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 5, less than the 9"):
            look(lengths)
    lengths[1] = 4
    look(lengths)
    with pytest.raises(ValueError, match=r"ends at 5; .* to T = 6"):
        look(lengths, 6)
    with torch.inference_mode():
        look(torch.tensor([0, 5]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = len(read)
    look(torch.tensor([9]))
    assert len(read) == before


def test_no_positions_have_no_documents():
    nothing = X[:1, :, :0]
    assert causal_attention(nothing, nothing, nothing, cu_seqlens=torch.tensor([0])).shape == nothing.shape


@pytest.mark.parametrize("dtype", dtypes())
def test_rows_of_one_key_have_no_gradient(dtype, isa):
    """Where one weight is 1 and the others are 0, delta is dP to the bit on a CPU, and dq and dk are exactly 0."""
    if isa in ("emu", "triton") or (isa == "amx" and dtype == torch.bfloat16):
        pytest.skip("tensor cores and AMX's tiles sum in an order of their own")
    q, k, v = torch.randn(3, 1, 2, 150, 80).to(dtype).unbind()
    q = q * 4000
    scores = q.double() @ k.double().mT * 80**-0.5 + torch.full((150, 150), -1e30).triu(1)
    first, second = scores.topk(2, -1).values.split(1, -1)
    rows = first - second > 200
    q = q.where(rows, 0).requires_grad_()
    leaves = (q, k.requires_grad_(), v.requires_grad_())
    out = ops.causal_attention(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.randn_like(out) * rows)
    assert rows.sum() > 100 and (dq == 0).all() and (dk == 0).all() and (dv != 0).any()
