"""causal_attention with sinks, soft caps, without causality and with padding on either side, beside transformers' own attention
and by their definitions; the parity cases stand in the op's table."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops, rng
from gptfast.ops.causal_attention import causal_attention
from gptfast.testing import dtypes
from tests.support.op_properties import check_compiles, check_no_double_backward

NINF = float("-inf")


def inputs(H: int, K: int, T: int, D: int, S: int | None = None, B: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """q, k, v and a sink a head, as leaves."""
    g = torch.Generator().manual_seed(H * K + T)
    sizes = (H, T), (K, S or T), (K, S or T)
    heads = [torch.randn(B, heads, n, D, generator=g).to(dtype).requires_grad_() for heads, n in sizes]
    return [*heads, (torch.randn(H, generator=g) * 2).to(dtype).requires_grad_()]


def by_hand(
    qkv: Any, sees: Tensor, sinks: Tensor | None = None, softcap: float = 0.0, keep: Any = 1.0
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, written from the definition. sees: (B or 1, 1, T, S); keep: scaled dropout mask."""
    q, k, v = (x.double() for x in qkv)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = torch.exp(scores) * sees
    total = weights.sum(-1) + (0 if sinks is None else torch.exp(sinks.double())[None, :, None])
    out = torch.einsum("bhts,bhsd->bhtd", weights * keep / total[..., None].clamp(min=1e-300), v)
    return out, total.log()


def causal(T: int, S: int | None = None) -> Tensor:
    S = S or T
    return (torch.arange(S) <= torch.arange(T)[:, None] + S - T)[None, None]


def assert_near(got: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 5e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * 4)


# ---- sinks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes())
def test_sinks_by_their_definition(dtype, isa):
    """Result, lse and every gradient; that of a sink is -sum p_sink (out . dout)."""
    q, k, v, sinks = inputs(4, 2, 50, 24, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    expected, lse = by_hand(wide[:3], causal(50), wide[3])
    got, ours = causal_attention(q, k, v, sinks, enable_gqa=True, return_lse=True)
    upstream = torch.randn(got.shape).to(dtype)
    assert_near([got, *torch.autograd.grad(got, (q, k, v, sinks), upstream)], [
        expected,
        *torch.autograd.grad(expected, wide, upstream.double()),
    ], dtype)  # fmt: skip
    torch.testing.assert_close(ours.double(), lse.detach(), rtol=1e-5, atol=1e-5)
    sink_weight = torch.exp(wide[3][None, :, None] - lse)
    closed = -(sink_weight * (expected * upstream.double()).sum(-1)).sum((0, 2))
    assert_near(
        torch.autograd.grad(causal_attention(q, k, v, sinks, enable_gqa=True), sinks, upstream), [closed], dtype
    )


@pytest.mark.parametrize("extra", [{}, {"dropout": 0.0, "window": 9}])
def test_sinks_are_those_of_gpt_oss(extra, isa):
    module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v, sinks = inputs(6, 2, 33, 16)
    window = extra.get("window")
    sees = causal(33) if window is None else causal(33) & ~causal(33).roll(window, 2).tril(-window)
    mask = torch.zeros(1, 1, 33, 33).masked_fill(~sees, torch.finfo(torch.float32).min)
    layer = SimpleNamespace(num_key_value_groups=3, sinks=sinks, training=False)
    expected, _ = module.eager_attention_forward(layer, q, k, v, mask, scaling=16**-0.5)
    got = causal_attention(q, k, v, sinks, window=window, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn(got.shape)
    leaves = (q, k, v, sinks)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_no_key_gives_all_weight_to_its_sink(isa):
    q, k, v, sinks = inputs(2, 2, 7, 8, S=9)
    options = {"seq_lens": torch.tensor([9, 0]), "causal": False}
    out, lse = causal_attention(q, k, v, sinks, return_lse=True, **options)
    assert (out[1] == 0).all() and (out[0] != 0).any()
    torch.testing.assert_close(lse[1], sinks.detach()[:, None].expand(2, 7))
    grads = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    alone = torch.autograd.grad(causal_attention(q[:1], k[:1], v[:1], sinks, causal=False).sum(), sinks)[0]
    assert all((g[1] == 0).all() for g in grads[:3])
    torch.testing.assert_close(grads[3], alone, rtol=1e-5, atol=1e-6)


def test_extreme_sinks(isa):
    """-inf is no sink; one far above every score takes all weight, one far below none, and nothing is nan."""
    q, k, v, _ = inputs(4, 4, 20, 8)
    plain, plain_lse = causal_attention(q, k, v, return_lse=True)
    sinks = torch.tensor([NINF, 1e5, -1e5, 1e30], requires_grad=True)
    out, lse = causal_attention(q, k, v, sinks, return_lse=True)
    torch.testing.assert_close(out[:, ::2], plain[:, ::2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[:, ::2], plain_lse[:, ::2], rtol=1e-5, atol=1e-5)
    assert (out[:, 1::2] == 0).all()
    torch.testing.assert_close(lse[:, 1], torch.full((2, 20), 1e5))
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
    assert all(g.isfinite().all() for g in grads) and (grads[3] == 0).all()


@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"window": 30}], ids=["plain", "softcap", "window"])
def test_decoding_over_cached_keys_is_the_end_of_the_full_call(extra, isa):
    q, k, v, sinks = (x.detach() for x in inputs(6, 2, 150, 16))
    full = causal_attention(q, k, v, sinks, enable_gqa=True, **extra)
    for T in (1, 3, 40):
        last = causal_attention(q[:, :, -T:], k, v, sinks, enable_gqa=True, **extra)
        torch.testing.assert_close(last, full[:, :, -T:], rtol=1e-5, atol=2e-6)


def test_sinks_of_another_dtype(isa):
    """A module keeps its sinks in float32 while autocast makes q, k and v bfloat16."""
    q, k, v, sinks = inputs(2, 2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_attention(q, k, v, sinks)
    (gradient,) = torch.autograd.grad(out.float().sum(), sinks)
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    torch.testing.assert_close(out.float(), causal_attention(q, k, v, sinks), rtol=3e-2, atol=3e-2)
    wide = causal_attention(q, k, v, sinks.double())
    torch.testing.assert_close(wide, causal_attention(q, k, v, sinks), rtol=1e-5, atol=1e-6)


# ---- soft caps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("softcap", [0.7, 5.0, 50.0])
def test_soft_caps_by_their_definition(softcap, dtype, isa):
    q, k, v, _ = inputs(4, 2, 50, 24, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, lse = by_hand(wide, causal(50), softcap=softcap)
    got, ours = causal_attention(q, k, v, softcap=softcap, enable_gqa=True, return_lse=True)
    upstream = torch.randn(got.shape).to(dtype)
    found = [got, *torch.autograd.grad(got, (q, k, v), upstream)]
    assert_near(found, [expected, *torch.autograd.grad(expected, wide, upstream.double())], dtype)
    torch.testing.assert_close(ours.double(), lse.detach(), rtol=1e-5, atol=1e-5)


def test_soft_caps_are_those_of_gemma2(isa):
    module = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    q, k, v, _ = inputs(6, 2, 33, 16)
    mask = torch.zeros(1, 1, 33, 33).masked_fill(~causal(33), torch.finfo(torch.float32).min)
    layer = SimpleNamespace(num_key_value_groups=3, head_dim=16, training=False)
    expected, _ = module.eager_attention_forward(layer, q, k, v, mask, scaling=0.6, softcap=1.3)
    got = causal_attention(q, k, v, softmax_scale=0.6, softcap=1.3, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn(got.shape)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_scores_far_beyond_the_cap(isa):
    """tanh is 1 there, and its slope 0: finite results and gradients."""
    q, k, v, _ = inputs(2, 2, 40, 16)
    big = (q.detach() * 1e4).requires_grad_()
    out = causal_attention(big, k, v, softcap=30.0)
    expected, _ = by_hand((big, k, v), causal(40), softcap=30.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (big, k, v)))


def test_no_cap_is_none(isa):
    q, k, v, _ = inputs(2, 2, 20, 16)
    assert torch.equal(causal_attention(q, k, v, softcap=0.0), causal_attention(q, k, v))
    wide = causal_attention(q, k, v, softcap=1e4)
    torch.testing.assert_close(wide, causal_attention(q, k, v), rtol=1e-5, atol=1e-5)


# ---- who sees whom --------------------------------------------------------------------------------------------------


def test_bidirectional_attention_is_that_of_bert(isa):
    """With a mask of padding on both sides, as BERT makes it of attention_mask."""
    module = pytest.importorskip("transformers.models.bert.modeling_bert")
    q, k, v, _ = inputs(4, 4, 40, 16, B=3)
    attention_mask = torch.ones(3, 40, dtype=torch.int64)
    attention_mask[0, 25:] = attention_mask[1, :9] = attention_mask[2, :3] = attention_mask[2, 33:] = 0
    left_pad, seq_lens = ops.real_keys(attention_mask)
    assert left_pad.tolist() == [0, 9, 3] and seq_lens.tolist() == [25, 40, 33]
    mask = torch.zeros(3, 1, 1, 40).masked_fill(~attention_mask.bool()[:, None, None], torch.finfo(torch.float32).min)
    expected, _ = module.eager_attention_forward(SimpleNamespace(training=False), q, k, v, mask)
    got = causal_attention(q, k, v, causal=False, left_pad=left_pad, seq_lens=seq_lens).transpose(1, 2)
    upstream = torch.randn(got.shape)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"causal": False}, {}, {"window": 20}], ids=["full", "causal", "window"])
def test_a_padded_row_equals_its_tokens_alone(options, isa):
    q, k, v, sinks = inputs(4, 2, 90, 24)
    with torch.no_grad():
        for x in (k, v):  # what is padding never leaks
            x[0, :, :37], x[1, :, 70:], x[1, :, :5] = float("nan"), float("inf"), float("nan")
    pads, ends = torch.tensor([37, 5]), torch.tensor([90, 70])
    out = causal_attention(q, k, v, sinks, left_pad=pads, seq_lens=ends, enable_gqa=True, **options)
    real = torch.zeros_like(out)
    for b in range(2):
        real[b, :, pads[b] : ends[b]] = 1
    grads = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape) * real)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    for b, (first, end) in enumerate(zip(pads.tolist(), ends.tolist(), strict=True)):
        part = [x[b : b + 1, :, first:end] for x in (q, k, v)]
        alone = causal_attention(part[0], part[1], part[2], sinks, enable_gqa=True, **options)
        torch.testing.assert_close(out[b : b + 1, :, first:end], alone, rtol=1e-5, atol=2e-6)
        assert all((g[b, :, :first] == 0).all() and (g[b, :, end:] == 0).all() for g in grads[1:])


def test_packed_texts_without_causality_equal_single_ones(isa):
    cu = torch.tensor([0, 20, 21, 90], dtype=torch.int32)
    q, k, v, sinks = inputs(4, 2, 90, 16, B=1)
    packed = causal_attention(q, k, v, sinks, causal=False, cu_seqlens=cu, softcap=3.0, enable_gqa=True)
    for a, b in pairwise(cu.tolist()):
        part = [x[:, :, a:b] for x in (q, k, v)]
        alone = causal_attention(part[0], part[1], part[2], sinks, causal=False, softcap=3.0, enable_gqa=True)
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", dtypes())
def test_dropout_with_sinks_cap_and_padding_uses_the_contract_mask(dtype, isa):
    p, seed, offset = 0.3, 2**40 + 17, 5
    q, k, v, sinks = inputs(3, 3, 70, 32, dtype=dtype)
    pads, ends = torch.tensor([0, 11]), torch.tensor([50, 70])
    places = torch.arange(70)
    sees = (places >= pads[:, None]) & (places < ends[:, None])
    options = {"causal": False, "left_pad": pads, "seq_lens": ends, "softcap": 2.0}
    out = causal_attention(q, k, v, sinks, dropout_p=p, seed=seed, offset=offset, **options)
    keep = rng.dropout_keep((6, 70, 70), p, seed, offset).view(2, 3, 70, 70) * rng.dropout_scale(p)
    expected, _ = by_hand((q, k, v), sees[:, None, None], sinks, 2.0, keep)
    assert_near([out], [expected], dtype)


def test_real_keys():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    for given in (mask, mask.bool(), mask.float()):
        left_pad, seq_lens = ops.real_keys(given)
        assert left_pad.tolist() == [1, 0, 0, 3] and seq_lens.tolist() == [3, 4, 0, 4]
    assert [x.shape for x in ops.real_keys(torch.ones(3, 0))] == [(3,), (3,)]
    with pytest.raises(ValueError, match="real_keys: row 1 of attention_mask has padding between its tokens"):
        ops.real_keys(torch.tensor([[1, 1, 0], [1, 0, 1]]))
    with pytest.raises(ValueError, match=r"real_keys: attention_mask has shape \(3,\); expected \(B, S\)"):
        ops.real_keys(torch.ones(3))
    no_tensor: Any = [[1, 1]]
    with pytest.raises(TypeError, match="real_keys: attention_mask is a list"):
        ops.real_keys(no_tensor)


# ---- properties -----------------------------------------------------------------------------------------------------


def test_reference_gradcheck():
    q, k, v, sinks = (x.detach().double().requires_grad_() for x in inputs(2, 1, 6, 4, B=2))
    options = {"dropout_p": 0.3, "seed": 1, "softcap": 1.5, "left_pad": torch.tensor([0, 2]), "enable_gqa": True}
    torch.autograd.gradcheck(lambda *x: causal_attention(*x, **options), (q, k, v, sinks))


def test_compiles():
    q, k, v, sinks = (x.detach() for x in inputs(4, 2, 20, 8))
    options = {"dropout_p": 0.2, "seed": 5, "softcap": 2.0, "enable_gqa": True}
    check_compiles(lambda *x: causal_attention(*x, left_pad=torch.tensor([0, 3]), **options) * 2, q, k, v, sinks)


def test_no_double_backward():
    q, k, v, sinks = (x.detach() for x in inputs(2, 2, 4, 8))
    check_no_double_backward(lambda s: causal_attention(q, k, v, s), sinks, "causal_attention: double backward")


X = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \(2,\); expected \(3,\), one logit a head of q"),
        ({"sinks": torch.zeros(2, 1, 5, 5)}, ValueError, r"sinks has shape .* a mask is no argument of this op"),
        ({"sinks": [0.0] * 3}, TypeError, "sinks is a list; expected a torch.Tensor"),
        ({"sinks": torch.zeros(3, dtype=torch.int64)}, TypeError, "sinks has dtype torch.int64"),
        ({"sinks": torch.zeros(3, device="meta")}, ValueError, "on one device, got .* sinks on meta"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0; expected a finite number above 0"),
        ({"softcap": float("inf")}, ValueError, "softcap is inf"),
        ({"softcap": float("nan")}, ValueError, "softcap is nan"),
        ({"softcap": True}, TypeError, "softcap is True"),
        ({"left_pad": torch.tensor([1])}, ValueError, "left_pad has 1 entries for a batch of 2"),
        ({"left_pad": torch.tensor([0, 6])}, ValueError, r"left_pad\[1\] is 6; expected 0 to S = 5"),
        ({"left_pad": torch.tensor([-1, 0])}, ValueError, r"left_pad\[0\] is -1"),
        ({"left_pad": torch.ones(2)}, TypeError, "left_pad has .*float32; expected a vector of int32 or int64"),
        ({"left_pad": [0, 1]}, TypeError, "left_pad is a list"),
    ],
    ids=str,
)
def test_errors(call, error, match, backend):
    with pytest.raises(error, match=match):
        causal_attention(X, X, X, **call, backend=backend)
