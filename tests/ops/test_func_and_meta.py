"""Ops and models under torch.func, forward-mode AD and on the meta device: as PyTorch's own, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import gptfast
from gptfast import GPT, GPTConfig, ops
from gptfast.backend import has_cpu_ops
from gptfast.testing import CASES

R = torch.randn
TABLES = ops.rotary_tables(5, 6)
OPS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "gelu": (ops.gelu, (R(3, 8), R(8))),
    "linear": (lambda x, w, b: ops.linear(x, w, b, "gelu"), (R(70, 8), R(5, 8), R(5))),
    "layer_norm": (ops.layer_norm, (R(3, 8), R(8), R(8))),
    "add_layer_norm": (lambda x, r, w: ops.add_layer_norm(x, r, w)[0], (R(3, 8), R(3, 8), R(8))),
    "rms_norm": (ops.rms_norm, (R(3, 8), R(8))),
    "add_rms_norm": (lambda x, r, w: ops.add_rms_norm(x, r, w)[0], (R(3, 8), R(3, 8), R(8))),
    "rotary": (lambda x: ops.rotary(x, *TABLES, positions=torch.tensor([1, 0, 4])), (R(1, 2, 3, 8),)),
    "swiglu": (lambda g, u: ops.swiglu(g, u, alpha=1.702, limit=1.0), (R(3, 8), R(3, 8))),
    "swiglu of one": (lambda g: ops.swiglu(g, layout="interleaved"), (R(3, 8),)),
    "relu_squared": (ops.relu_squared, (R(3, 8),)),
    "dropout": (lambda x: ops.dropout(x, 0.3, seed=1), (R(3, 8),)),
    "embedding": (lambda w: ops.embedding(torch.tensor([[1, 0, 2]]), w), (R(4, 8),)),
    "causal_attention": (ops.causal_attention, (R(1, 2, 5, 8), R(1, 2, 5, 8), R(1, 2, 5, 8))),
    "grouped attention": (
        lambda q, k, v: ops.causal_attention(q, k, v, enable_gqa=True),
        (R(1, 4, 5, 8), R(1, 2, 5, 8), R(1, 2, 5, 8)),
    ),
    "sinks and soft cap": (
        lambda q, k, v, s: ops.causal_attention(q, k, v, s, softcap=2.0, left_pad=torch.tensor([1])),
        (R(1, 2, 5, 8), R(1, 2, 5, 8), R(1, 2, 5, 8), R(2)),
    ),
    "cross_entropy": (lambda x: ops.cross_entropy(x, torch.tensor([1, 0, -100])), (R(3, 8),)),
    "linear_cross_entropy": (lambda h, w: ops.linear_cross_entropy(h, w, torch.tensor([1, 0, 2])), (R(3, 8), R(5, 8))),
    "linear_logprobs": (lambda h, w: ops.linear_logprobs(h, w, torch.tensor([1, 0, 2])), (R(3, 8), R(5, 8))),
}


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("name", OPS)
def test_transforms_of_ops(name: str, backend: str | None):
    op, inputs = OPS[name]

    def call(*arguments: Tensor) -> Tensor:
        with gptfast.backend(backend or "auto"):
            return op(*arguments)

    def total(*arguments: Tensor) -> Tensor:
        return call(*arguments).square().sum()

    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    expected = torch.autograd.grad(total(*leaves), leaves)
    every = tuple(range(len(inputs)))
    for got in (grad(total, every)(*inputs), jacrev(total, every)(*inputs)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    several = tuple(torch.stack([x, 2 * x, -x]) for x in inputs)
    rows = [call(*(x[n] for x in several)) for n in range(3)]
    torch.testing.assert_close(vmap(call)(*several), torch.stack(rows), rtol=1e-4, atol=1e-5)
    per_sample = vmap(grad(total, every))(*several)
    torch.testing.assert_close([x[0] for x in per_sample], list(expected), rtol=1e-4, atol=1e-5)
    tangents = tuple(torch.ones_like(x) for x in inputs)
    slope = sum(x.sum() for x in expected)
    torch.testing.assert_close(jvp(total, inputs, tangents)[1], slope, rtol=1e-3, atol=1e-3)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        told = torch.autograd.forward_ad.unpack_dual(total(*duals)).tangent
    torch.testing.assert_close(told, slope, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
def test_kernels_that_are_asked_for_are_refused():
    x = R(3, 8)
    for transform in (vmap(lambda x: ops.gelu(x, backend="cpu")), grad(lambda x: ops.gelu(x, backend="cpu").sum())):
        with pytest.raises(
            RuntimeError,
            match=r"gelu: backend='cpu' was asked for, but torch.func \(vmap, grad, jvp, ...\) and forward-mode AD cannot look "
            "into its kernels; use backend='eager'",
        ):
            transform(x)
    assert ops.gelu(x, backend="cpu").shape == (3, 8), "and outside they run again"


def small(**options: Any) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 31, "block_size": 12, "dropout": 0.0}
    return GPT(GPTConfig(**{**sizes, **options}))


@pytest.mark.parametrize("training", [True, False])
def test_per_sample_gradients_of_a_model(training: bool):
    model = small().train(training)
    ids, targets = torch.randint(31, (3, 9)), torch.randint(31, (3, 9))
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        return functional_call(model, weights, (ids[None], targets[None]))[1]

    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, ids, targets)
    for n in range(3):
        model.zero_grad()
        model(ids[n : n + 1], targets[n : n + 1])[1].backward()
        for name, weight in weights.items():
            torch.testing.assert_close(got[name][n], weight.grad, rtol=1e-3, atol=1e-5)
    one = {"ln_f.bias": weights["ln_f.bias"]}
    second = hessian(lambda b: loss({**weights, "ln_f.bias": b}, ids[0], targets[0]))(one["ln_f.bias"])
    assert second.shape == (16, 16) and torch.allclose(second, second.T, atol=1e-5) and second.abs().max() > 1e-4


def test_many_backward_passes_at_once():
    """jacobian(vectorize=True): the forward runs on the kernels, and backward under vmap."""
    for name in OPS:
        op, inputs = OPS[name]
        call = lambda *x, op=op: op(*x).square()  # noqa: E731
        with gptfast.backend("eager"):
            expected = torch.autograd.functional.jacobian(call, inputs, vectorize=True)
        got = torch.autograd.functional.jacobian(call, inputs, vectorize=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# ---- meta -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in CASES if op not in ("sample",)])
def test_ops_on_meta(op: str):
    for case in CASES[op][:6]:
        inputs = case.inputs(torch.float32)
        on_meta = [x.to("meta") if isinstance(x, Tensor) else x for x in inputs]
        options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.options.items()}
        expected, got = getattr(ops, op)(*inputs, **case.options), getattr(ops, op)(*on_meta, **options)
        pairs = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
        for one, two in pairs:
            assert two.device.type == "meta" and (one.shape, one.dtype) == (two.shape, two.dtype)


def test_quantising_on_meta_and_of_nothing():
    assert ops.quantize_nf4(torch.empty(3, 64, device="meta"), double=True).codes.is_meta
    assert all(x.is_meta for x in ops.quantize_groups(torch.empty(3, 64, device="meta")))
    for shape in [(0, 64), (4, 0), (0, 0), (0,)]:
        for double in (False, True):
            packed = ops.quantize_nf4(torch.zeros(shape), double=double)
            assert ops.dequantize_nf4(*packed, shape=shape).shape == shape
            assert len(packed.rows(shape[0])[0]) == shape[0]
    with pytest.raises(ValueError, match=r"NF4.rows: out_features is 5, but there are 3 blocks; expected whole"):
        ops.quantize_nf4(torch.zeros(3, 64)).rows(5)
    for format in ("int8", "int4", "mxfp4"):
        for shape in [(0, 4), (4, 0), (0, 0)]:
            weight = torch.zeros(shape)
            packed = ops.quantize_mxfp4(weight) if format == "mxfp4" else ops.quantize_groups(weight, format)
            assert ops.quantized_linear(torch.zeros(2, shape[1]), *packed, format=format).shape == (2, shape[0])


def test_no_channels():
    """Sizes of 0, as PyTorch has them."""
    for shape in [(2, 3, 0), (0, 0), (0,)]:
        x = torch.zeros(shape, requires_grad=True)
        got = ops.linear(x, torch.zeros(4, 0), torch.ones(4), backend=None)
        assert torch.equal(got, torch.ones(*shape[:-1], 4))
        got.sum().backward()
        assert x.grad is not None and x.grad.shape == shape
    loss = ops.linear_cross_entropy(torch.zeros(3, 0), torch.zeros(5, 0), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(loss, torch.tensor(5.0).log())


def test_a_model_on_meta(tmp_path: Path):
    with torch.device("meta"):
        model = small()
        ids = torch.zeros(2, 9, dtype=torch.int64)
        logits = model.eval()(ids)
        assert logits.device.type == "meta" and logits.shape == (2, 9, 31)
        loss = model.train()(ids, ids)[1]
        loss.backward()
    assert model.wte.weight.grad is not None and model.wte.weight.grad.device.type == "meta"
    model.eval()
    for call in (
        lambda: model.generate([[1, 2]], max_new_tokens=2),
        lambda: model.compile_for_inference(),
        lambda: model.save_pretrained(tmp_path / "x"),
    ):
        with pytest.raises(
            ValueError, match=r"wte.weight is on the meta device, which holds no values; load them with GPT."
        ):
            call()
    assert not (tmp_path / "x").exists()
    real = small().eval()
    real.save_pretrained(tmp_path / "real")
    torch.set_default_device("meta")
    try:
        loaded = GPT.from_pretrained(tmp_path / "real")
        written = loaded.generate([[1, 2]], max_new_tokens=3, temperature=0)
    finally:
        torch.set_default_device(None)
    assert loaded.wte.weight.device.type == "cpu"
    assert written == real.generate([[1, 2]], max_new_tokens=3, temperature=0)
