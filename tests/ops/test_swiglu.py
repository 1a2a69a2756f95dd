"""swiglu: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import cases, check_case, dtypes
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("swiglu")
GPT_OSS = {"alpha": 1.702, "limit": 7.0}


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("n", range(34))
def test_every_tail_length(n, isa):
    """All lengths from 0 to two AVX-512 vectors, at each misalignment of a 16-byte line, in each layout."""
    for shift in range(4):
        gate, up = torch.randn(2, n + shift)[:, shift:]
        expected = reference.swiglu(gate.double(), up.double(), **GPT_OSS).float()
        halves = torch.cat([torch.empty(shift), gate, up])[shift:]
        pairs = torch.cat([torch.empty(shift), torch.stack([gate, up], -1).flatten()])[shift:]
        for got in (
            ops.swiglu(gate, up, **GPT_OSS),
            ops.swiglu(halves, **GPT_OSS),
            ops.swiglu(pairs, layout="interleaved", **GPT_OSS),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 1.702])
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_one_tensor_is_two(layout, alpha, isa):
    """To the bit, with its gradients."""
    gate, up, dy = torch.randn(3, 5, 37)
    both = torch.cat([gate, up], -1) if layout == "halves" else torch.stack([gate, up], -1).flatten(-2)
    leaves = [t.clone().requires_grad_() for t in (gate, up, both)]
    one = ops.swiglu(leaves[2], alpha=alpha, limit=2.0, layout=layout)
    two = ops.swiglu(*leaves[:2], alpha=alpha, limit=2.0)
    (packed,) = torch.autograd.grad(one, leaves[2], dy)
    grads = torch.autograd.grad(two, leaves[:2], dy)
    parts = packed.chunk(2, -1) if layout == "halves" else (packed[..., ::2], packed[..., 1::2])
    assert torch.equal(one, two) and all(torch.equal(a, b) for a, b in zip(parts, grads, strict=True))


def test_extremes(isa):
    """Finite where eager is, and 0 far below 0, without inf * 0."""
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 100.0, -100.0, 1e30, -1e30, 2e38, -1e38, float("nan")])
    for options in ({}, {"alpha": 1.702}, GPT_OSS):
        g, u = gate.clone().requires_grad_(), torch.full_like(gate, 0.5, requires_grad=True)
        y = ops.swiglu(g, u, **options)
        dg, du = torch.autograd.grad(y, (g, u), torch.ones_like(y))
        e, v = gate.double().requires_grad_(), torch.full_like(gate, 0.5).double().requires_grad_()
        expected = reference.swiglu(e, v, **options)
        wanted = torch.autograd.grad(expected, (e, v), torch.ones_like(expected))
        for got, exact in ((y, expected), (dg, wanted[0]), (du, wanted[1])):
            assert got[:12].isfinite().all()
            torch.testing.assert_close(got[:12].double(), exact[:12], rtol=1e-5, atol=1e-30)
        assert y[12].isnan() and du[12].isnan()


def test_gradients_at_the_clamp(isa):
    """At the limit itself the gradient passes, beyond it nothing does: as of torch.clamp."""
    values = torch.tensor([-8.0, -7.0, -6.9, 0.0, 6.9, 7.0, 7.1, math.inf, -math.inf])
    gate, up = (t.flatten().clone() for t in torch.meshgrid(values[:-1], values, indexing="ij"))
    results = []
    for call in (ops.swiglu, reference.swiglu):
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        y = call(*leaves, **GPT_OSS)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    dgate, dup = results[0][1:]
    assert (dgate[gate > 7] == 0).all() and (dgate[gate == 7] != 0).any()
    assert (dup[up.abs() > 7] == 0).all() and (dup[(up.abs() == 7) & (gate == 7)] != 0).all()


def test_whole_numbers_beyond_64_bits_are_numbers():
    for device in ("cpu", "meta"):
        x = torch.ones(2, 4, device=device)
        y = ops.swiglu(x, x, alpha=1, limit=2**64, backend="eager")
        assert y.shape == x.shape and (device == "meta" or torch.equal(y, ops.swiglu(x, x, alpha=1.0, backend="eager")))


def test_the_modules_of_transformers():
    """gpt-oss' experts, and the MLP of Llama."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(hidden_size=8, intermediate_size=24, num_local_experts=2)
    experts, both = gpt_oss.GptOssExperts(config), 6 * torch.randn(30, 48)
    ours = ops.swiglu(both, alpha=experts.alpha, limit=experts.limit, layout="interleaved")
    assert (experts.alpha, experts.limit) == (1.702, 7.0)
    torch.testing.assert_close(ours, experts._apply_gate(both), rtol=1e-5, atol=1e-6)
    llama = transformers.models.llama.modeling_llama.LlamaMLP(
        transformers.LlamaConfig(hidden_size=8, intermediate_size=24, num_attention_heads=2)
    )
    x = torch.randn(3, 8)
    ours = llama.down_proj(ops.swiglu(llama.gate_proj(x), llama.up_proj(x)))
    torch.testing.assert_close(ours, llama(x), rtol=1e-5, atol=1e-6)


def test_two_dtypes(isa):
    gate, up = torch.randn(5, 33, requires_grad=True), torch.randn(5, 33).bfloat16().requires_grad_()
    y = ops.swiglu(gate, up)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.silu(gate) * up.float(), rtol=1e-5, atol=1e-6)
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert dgate.dtype == torch.float32 and dup.dtype == torch.bfloat16
    assert ops.swiglu(gate.half(), up).dtype == torch.float32


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.float32)


def test_pure():
    for case in CASES:
        check_pure(case, torch.bfloat16)


def test_fp64_passes_gradcheck():
    g, u = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_()
    for options in ({}, {"alpha": 1.702, "limit": 1.0}):
        torch.autograd.gradcheck(lambda g, u, o=options: ops.swiglu(g, u, **o), (g, u))
        torch.autograd.gradcheck(lambda g, o=options: ops.swiglu(g, layout="interleaved", **o), (g,))


def test_compiles():
    g, u = torch.randn(2, 6, 16)
    check_compiles(lambda g, u: ops.swiglu(g, u, **GPT_OSS) * 2, g, u)
    check_compiles(lambda g: ops.swiglu(g, g), g)
    check_compiles(lambda g: ops.swiglu(g, layout="interleaved") * 2, g)


def test_no_double_backward():
    check_no_double_backward(lambda g: ops.swiglu(g, g), torch.randn(4), "swiglu: double backward")


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.swiglu(X.int(), X), TypeError, "swiglu: gate has dtype torch.int32"),
        (lambda: ops.swiglu(X, X[:1]), ValueError, r"swiglu: gate has shape \(2, 4\) but up has \(1, 4\)"),
        (
            lambda: ops.swiglu(X[:, :3]),
            ValueError,
            r"swiglu: gate has shape \(2, 3\) and up is None; expected \(..., 2 F\)",
        ),
        (lambda: ops.swiglu(torch.tensor(1.0)), ValueError, r"swiglu: gate has shape \(\) and up is None"),
        (lambda: ops.swiglu(X, X, alpha=0.0), ValueError, "swiglu: alpha is 0.0; expected None or a finite number > 0"),
        (lambda: ops.swiglu(X, X, limit=-7), ValueError, "swiglu: limit is -7; expected None or"),
        (lambda: ops.swiglu(X, X, limit=math.nan), ValueError, "swiglu: limit is nan"),
        (lambda: ops.swiglu(X, X, alpha=True), TypeError, "swiglu: alpha is True"),
        (
            lambda: ops.swiglu(X, layout="pairs"),
            ValueError,
            "swiglu: layout is 'pairs'; expected one of 'halves', 'inter",
        ),
        (lambda: ops.swiglu(X, X, layout="interleaved"), ValueError, "swiglu: layout is 'interleaved' but up is given"),
        (lambda: ops.swiglu(X, X.to("meta")), ValueError, "swiglu: all tensors must be on one device"),
        (lambda: ops.swiglu(None, X), TypeError, "swiglu: gate is a NoneType"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
