"""append_and_attend: a decoding step's attention on the CUDA kernels is an assignment and `causal_attention`."""

from __future__ import annotations

import pytest
import torch

import gptfast
from gptfast import ops
from gptfast.backend import kernels
from gptfast.testing import DTYPES
from tests.support import emulated

SHAPES = {
    "few keys": (3, 2, 2, 20, 8),  # B, H, heads of keys, S, D
    "odd head dim": (2, 3, 1, 40, 7),
    "keys in parts": (2, 2, 2, 300, 64),
    "shared keys in parts": (2, 8, 2, 200, 24),
    "one query a head, wide": (1, 2, 2, 140, 128),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2 * 2.0**-7}


@pytest.mark.parametrize("dtype", [pytest.param(DTYPES[n], id=n) for n in ("fp32", "bf16")])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_is_an_assignment_and_an_attention(shape, dtype, emu):
    B, H, K, S, D = shape
    qkv = torch.randn(B, 1, H + 2 * K, D).to(dtype)  # views of one buffer, as c_attn leaves it
    q, k, v = (x.transpose(1, 2) for x in qkv.split((H, K, K), 2))
    store = torch.randn(2, B + 1, K, S, D).to(dtype)
    counters = torch.zeros(B * H, dtype=torch.int32)
    lengths = torch.tensor([S - 1, 0, S + 3][:B])  # the last position, the first, and a row that nobody uses
    for cap, sinks in ((None, None), (2.0, None), (None, torch.randn(H))):
        results = []
        for backend in ("emu", "cpu"):
            keys, values = store.clone()[:, :B]
            with gptfast.backend(backend):
                y = ops.append_and_attend(
                    q, k, v, keys, values, lengths, counters, sinks=sinks, softcap=cap, enable_gqa=True
                )
            assert not counters.any(), "they are zeros again for the next step"
            results.append((y, keys, values))
        (y, *written), (expected, *assigned) = results
        assert y.shape == (B, H, 1, D) and y.dtype == dtype
        used = lengths < S
        for a, b in zip(written, assigned, strict=True):
            assert torch.equal(a[used], b[used])
            assert torch.equal(a[~used], store[0 if a is written[0] else 1, :B][~used]), "nothing is stored"
        torch.testing.assert_close(y[used], expected[used], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert y.isfinite().all()


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_it_starts_before_the_kernel_before_has_ended(order, emu):
    """It waits before it reads anything that an earlier kernel may write."""
    B, H, S, D = 2, 3, 300, 16
    q, k, v = torch.randn(3, B, H, 1, D).bfloat16()
    keys, values = torch.randn(2, B, H, S, D).bfloat16()
    lengths, counters, sinks = torch.tensor([290, 70]), torch.zeros(B * H, dtype=torch.int32), torch.randn(H)
    emulated.configure(order)
    found = []
    for late, ready in [("", False), ("qs", True), ("qskvl", False), ("k", True), ("v", True)]:
        cache = keys.clone(), values.clone()
        named = {"q": q, "s": sinks, "k": cache[0], "v": cache[1], "l": lengths}
        with gptfast.backend("emu"), emulated.late(*(named[name] for name in late)):
            y = ops.append_and_attend(q, k, v, *cache, lengths, counters, sinks=sinks, cache_ready=ready)
        assert not counters.any()
        found.append((y, *cache))
    usual, *others = found
    assert all(torch.equal(a, b) for other in others[:2] for a, b in zip(usual, other, strict=True))
    assert all(y.isnan().all() for y, *_ in others[2:]), "keys and values are asked for early where they are ready"


def test_a_cache_of_another_dtype(emu):
    """What a model computes in fp32 is cast to the cache's dtype."""
    q, k, v = torch.randn(3, 2, 2, 1, 16)
    keys, values = torch.zeros(2, 2, 2, 9, 16, dtype=torch.bfloat16)
    y = ops.append_and_attend(q, k, v, keys, values, torch.tensor([0, 4]), COUNTERS)
    assert y.dtype == torch.bfloat16 and torch.equal(y[0], v[0].bfloat16()), "the only key has all the weight"
    assert torch.equal(keys[1, :, 4], k[1, :, 0].bfloat16())


X, LENGTHS = torch.zeros(2, 3, 1, 8), torch.zeros(2, dtype=torch.int64)
CACHE, COUNTERS = torch.zeros(2, 3, 5, 8), torch.zeros(6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            (X[:, :, [0, 0]], X, X, CACHE, CACHE, LENGTHS, COUNTERS),
            "causal_attention: q has 2 positions a row; expected the one",
        ),
        ((X, X, X[:, :2], CACHE, CACHE, LENGTHS, COUNTERS), "causal_attention: v and q differ in shape or dtype"),
        (
            (X, X, X, CACHE.mT.contiguous().mT, CACHE, LENGTHS, COUNTERS),
            "causal_attention: keys must be .* contiguous last",
        ),
        ((X, X, X, CACHE, CACHE, LENGTHS.int(), COUNTERS), "causal_attention: lengths must be int64"),
        (
            (X, X, X, CACHE, CACHE, LENGTHS, COUNTERS[:5]),
            "causal_attention: counters must be at least 6 zeros of int32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, match, emu):
    with pytest.raises(RuntimeError, match=match):
        kernels("emu").causal_attention_append(*arguments, 1.0, None, 0.0, True)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="causal_attention: k has 3 heads but q has 2"):
        ops.append_and_attend(X[:, :2], X, X, CACHE, CACHE, LENGTHS, COUNTERS)
