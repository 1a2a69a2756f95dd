"""linear_few: a linear layer of few rows with its norm, activation and residual sum, on the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gptfast
from gptfast import ops
from gptfast.backend import kernels
from gptfast.ops._linear_few import MOST_VALUES, RowNorm, few_backend, linear_few, takes_few
from gptfast.testing import DTYPES
from tests.support import emulated

SHAPES = {  # M, K, N
    "one row": (1, 64, 24),
    "ragged outputs": (3, 40, 13),
    "one chunk": (2, 8, 5),
    "eight rows": (8, 768, 50),
    "many steps": (5, 3072, 17),
    "two turns of loads": (2, 3400, 8),
}
NORMS = {"none": None, "layer_norm": "layer_norm", "rms_norm": "rms_norm", "bare": "layer_norm"}
ACTIVATIONS = {
    None: lambda z: z,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu_squared": lambda z: F.relu(z).square(),
}
CALLS = [(None, False, False), ("gelu_tanh", True, False), ("gelu", True, True), ("relu_squared", False, True)]
# Of one rounding: half a unit in the last place of the layer, and as much of the sum. fp32 sums of 3072 products add 1e-5.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def norm_of(kind: str, K: int, dtype: torch.dtype) -> RowNorm | None:
    if NORMS[kind] is None:
        return None
    weight, bias = (None, None) if kind == "bare" else (torch.randn(K).to(dtype), torch.randn(K).to(dtype))
    return RowNorm(NORMS[kind], weight, bias if kind == "layer_norm" else None, 1e-3)


def normed(x: Tensor, norm: RowNorm | None) -> Tensor:
    """x as the op of its own would leave it for the layer."""
    if norm is None:
        return x
    weight = x.new_ones(x.shape[1]) if norm.weight is None else norm.weight
    if norm.kind == "rms_norm":
        return ops.rms_norm(x, weight, norm.eps)
    return ops.layer_norm(x, weight, norm.bias, norm.eps)


@pytest.mark.parametrize("dtype", [pytest.param(DTYPES[n], id=n) for n in ("bf16", "fp16")])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_norm_layer_activation_and_sum(shape, kind, dtype, emu):
    M, K, N = shape
    x = (torch.randn(M + 1, K) + 3).to(dtype)[1:]
    weight, bias = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    residual = torch.randn(M, 2 * N).to(dtype)[:, :N]
    norm = norm_of(kind, K, dtype)
    with gptfast.backend("emu"):
        entering = normed(x, norm)
        assert few_backend(x) == "emu" and takes_few(M, K, norm is not None)
    for activation, with_bias, with_sum in CALLS:
        b, r = bias if with_bias else None, residual if with_sum else None
        y = linear_few("emu", x, weight, b, norm=norm, activation=activation, residual=r)
        z = F.linear(entering.double(), weight.double(), None if b is None else b.double())
        layer = ACTIVATIONS[activation](z)
        expected = layer if r is None else layer + r.double()
        assert y.shape == (M, N) and y.dtype == dtype
        allowed = UNIT[dtype] * (layer.abs() + expected.abs()) + 1e-5 * (1 + layer.abs())
        assert ((y.double() - expected).abs() <= allowed).all()


def test_a_row_has_the_same_bits_in_any_company(emu):
    x, weight = torch.randn(8, 96).bfloat16(), torch.randn(40, 96).bfloat16()
    norm = norm_of("layer_norm", 96, torch.bfloat16)
    together = linear_few("emu", x, weight, None, norm=norm)
    for m in range(8):
        assert torch.equal(linear_few("emu", x[m : m + 1], weight, None, norm=norm)[0], together[m])


def test_values_that_are_not_finite_stay_in_their_row(emu):
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    expected = linear_few("emu", x, weight, None)
    x[1, 5], x[2, 9] = float("nan"), float("inf")
    y = linear_few("emu", x, weight, None)
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert torch.equal(y[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("lazy", [True, False], ids=["late copies", "early copies"])
def test_it_starts_before_the_kernel_before_has_ended(order, lazy, emu):
    """It waits before it reads what that one may write: x and what is added, and the weights where they are not ready."""
    x, weight, bias = torch.randn(3, 600).bfloat16(), torch.randn(20, 600).bfloat16(), torch.randn(20).bfloat16()
    norm, residual = norm_of("layer_norm", 600, torch.bfloat16), torch.randn(3, 20).bfloat16()
    emulated.configure(order, lazy, seed=3)

    def run(*late: Tensor, ready: bool) -> Tensor:
        with emulated.late(*late):
            return linear_few(
                "emu", x, weight, bias, norm=norm, activation="gelu", residual=residual, weights_ready=ready
            )

    expected = run(ready=False)
    assert torch.equal(run(x, residual, bias, ready=True), expected)
    parameters = weight, bias, norm.weight, norm.bias
    assert torch.equal(run(x, residual, *parameters, ready=False), expected)
    for early in (weight, norm.weight, norm.bias):
        found = run(early, ready=True)
        # a copy that is asked for early may still come late
        assert found.isnan().all() or (lazy and early is not weight and torch.equal(found, expected))


def test_tensors_at_any_address(emu):
    """Rows and weights that do not begin at multiples of 16 bytes are copied first."""
    x, weight, scale = (torch.randn(n + 1).bfloat16()[1:] for n in (3 * 40, 24 * 40, 40))
    x, weight = x.view(3, 40), weight.view(24, 40)
    norm = RowNorm("layer_norm", scale, None, 1e-5)
    y = linear_few("emu", x, weight, None, norm=norm)
    same = linear_few("emu", x.clone(), weight.clone(), None, norm=norm._replace(weight=scale.clone()))
    assert torch.equal(y, same)
    wide = torch.randn(3, 44).bfloat16()  # rows at multiples of 88 bytes
    assert torch.equal(
        linear_few("emu", wide[:, :40], weight, None), linear_few("emu", wide[:, :40].clone(), weight, None)
    )


def test_what_it_takes(emu):
    x = torch.zeros(8, 16).bfloat16()
    assert takes_few(8, MOST_VALUES // 8, False) and not takes_few(8, MOST_VALUES // 8 + 8, False)
    assert takes_few(8, 2864, True)
    assert not takes_few(8, 2872, True), "a norm's weight and bias are in shared memory too"
    assert not takes_few(8, 12, False)
    with gptfast.backend("emu"):
        assert few_backend(x) == "emu"
        assert few_backend(x.float()) is None
        assert few_backend(torch.zeros(9, 16).bfloat16()) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert few_backend(x) is None
    with gptfast.backend("cpu"):
        assert few_backend(x) is None, "no kernel there"
    largest = torch.zeros(8, 2864).half()
    assert linear_few("emu", largest, largest, None, norm=RowNorm("rms_norm", None, None, 0.1)).eq(0).all()


X, W = torch.zeros(2, 16).bfloat16(), torch.zeros(8, 16).bfloat16()


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"x": X.float()}, "linear_few: x is float32; expected bfloat16 or float16"),
        ({"x": X[:, :8]}, r"linear_few: expected x \(M, K\) and a weight \(N, K\)"),
        (
            {"x": X[:, :12], "weight": W[:, :12]},
            "linear_few: 2 rows of 12 values; expected at most 8 rows, K a multiple of 8",
        ),
        ({"x": X.repeat(5, 1)}, "linear_few: 10 rows of 16 values"),
        (
            {"x": X.repeat(4, 200), "weight": W.repeat(1, 200), "norm": "rms_norm"},
            "linear_few: 8 rows of 3200 values with a norm",
        ),
        ({"weight": W.half()}, "linear_few: weight and x differ in dtype"),
        ({"bias": torch.zeros(8)}, "linear_few: bias and x differ in dtype"),
        ({"bias": W[0]}, "linear_few: bias has 16 values; expected 8"),
        ({"norm": "batch_norm"}, "linear_few: norm is batch_norm; expected layer_norm, rms_norm or none"),
        ({"norm": "rms_norm", "norm_weight": W[0, :8]}, "linear_few: norm_weight has 8 values; expected 16"),
        ({"activation": "silu"}, "linear_few: activation is silu; expected gelu_tanh, gelu, relu_squared or none"),
        ({"residual": X}, r"linear_few: expected a residual \(2, 8\)"),
        ({"norm": "rms_norm", "eps": -1.0}, "linear_few: eps is -1"),
    ],
)
def test_what_does_not_fit_is_refused(changed, match, emu):
    arguments = {"x": X, "weight": W, "bias": None, "norm": "", "norm_weight": None, "norm_bias": None, "eps": 0.0}
    arguments |= {"activation": "", "residual": None, "weights_ready": False} | changed
    with pytest.raises(RuntimeError, match=match):
        kernels("emu").linear_few(*arguments.values())
