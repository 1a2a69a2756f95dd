"""Arguments of several dtypes in one call: every gradient has the dtype of its own input, and no rounding but its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast import ops
from gptfast.testing import DTYPES
from gptfast.triton import INTERPRETING

N, C, V = 200, 24, 40
ROWS, COLUMNS, VOCABULARY = (N, C), (C,), (V, C)
IDS = torch.arange(N * 2).reshape(2, N) * 7 % V
CODES, SCALES = ops.quantize_groups(torch.linspace(-1, 1, V * C).view(V, C))


class Op(NamedTuple):
    """A call of one op and the shapes of its differentiable inputs."""

    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    streams: int = 1  # the first so many have a row of gradients for each of x, rounded as the stream is
    rounds: bool = False  # what the gradients of weights are summed from is rounded as the stream is
    autocast: bool = False


def total(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda h, w: loss(h, w, torch.arange(N) % V, reduction="sum")


OPS = {
    "layer_norm": Op(ops.layer_norm, (ROWS, COLUMNS, COLUMNS)),
    "add_layer_norm": Op(lambda *a: sum(ops.add_layer_norm(*a)), (ROWS, ROWS, COLUMNS, COLUMNS), 2, rounds=True),
    "rms_norm": Op(ops.rms_norm, (ROWS, COLUMNS)),
    "add_rms_norm": Op(lambda *a: sum(ops.add_rms_norm(*a)), (ROWS, ROWS, COLUMNS), 2, rounds=True),
    "swiglu": Op(ops.swiglu, (ROWS, ROWS), 2, rounds=True),
    "gelu": Op(ops.gelu, (ROWS, COLUMNS), rounds=True),  # in bf16 the slope is exact to 2^-14
    "embedding": Op(lambda wte, wpe: ops.embedding(IDS, wte, wpe), (VOCABULARY, ROWS), 0, rounds=True),
    "quantized_linear": Op(lambda x, bias: ops.quantized_linear(x, CODES, SCALES, bias), (ROWS, (V,)), rounds=True),
    "linear": Op(ops.linear, (ROWS, VOCABULARY, (V,)), autocast=True),
    "linear_gelu": Op(lambda *a: ops.linear(*a, "gelu_tanh"), (ROWS, VOCABULARY, (V,)), autocast=True),
    "linear_cross_entropy": Op(total(ops.linear_cross_entropy), (ROWS, VOCABULARY), autocast=True),
}
EMULATED = ("layer_norm", "add_layer_norm", "gelu", "embedding", "linear_cross_entropy")
PLACES = ["triton"] if INTERPRETING else ["cpu", "emu", "eager"]
CASES = [
    pytest.param(place, name, types, id="-".join((place, name, *types)))
    for place in PLACES
    for name, op in OPS.items()
    for types in product(DTYPES, repeat=len(op.shapes))
    if len(set(types)) > 1 and (name in EMULATED or place != "emu") and not (INTERPRETING and "bf16" in types)
    if len(types) < 4 or types[2] != types[3]
]


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "emu":
        request.getfixturevalue("emu")
    with gptfast.backend("eager" if request.param == "eager" else "auto"):
        yield request.param


@pytest.mark.parametrize(("place", "name", "types"), CASES, indirect=["place"])
def test_gradients(place, name, types):
    """Against float64. The sums over rows are fp32, so what belongs to weights is as exact as its own dtype allows."""
    op = OPS[name]
    leaves = [torch.randn(s).to(DTYPES[t]).requires_grad_() for s, t in zip(op.shapes, types, strict=True)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=op.autocast):
        out = op.call(*leaves)
    upstream = torch.randn(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, upstream)
    expected = torch.autograd.grad(op.call(*exact), exact, upstream.double())
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    products = torch.finfo(torch.bfloat16 if op.autocast else torch.float32).eps
    stream = max(torch.finfo(leaf.dtype).eps for leaf in leaves[: max(op.streams, 1)])
    for n, (got, wanted) in enumerate(zip(grads, expected, strict=True)):
        rounding = max(products, stream if n < op.streams or op.rounds else 0.0)
        scale = wanted.abs().max().item()
        own = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=own, atol=8 * rounding * scale + own * 1e-2)


@pytest.mark.parametrize("weight", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_a_bias_beyond_the_weights_dtype(place, weight):
    """Sums of 136,397: more than fp16 holds, and between two values of bf16."""
    w, b = torch.ones(8, dtype=weight), torch.zeros(8, requires_grad=True)
    x = torch.randn(4096, 8)
    for y in (ops.layer_norm(x, w, b), ops.add_layer_norm(x, x, w, b)[0]):
        (db,) = torch.autograd.grad(y, b, torch.full_like(y, 33.3))
        torch.testing.assert_close(db, torch.full((8,), 33.3 * 4096), rtol=4e-6, atol=0)  # measured 1.3e-6
