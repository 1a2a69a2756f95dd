"""torch.library.opcheck of every operator: schema, fake, derivative, and how torch.compile sees them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from gptfast import _schemas
from gptfast.backend import has_cpu_ops
from gptfast.ops import _registry
from tests.support.native_calls import calls

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")

# The arguments that a gradient flows to. Every operator with tensors is in this table or in the next.
DIFFERENTIABLE = {
    "add_layer_norm_fwd": ("x", "residual", "weight", "bias"),
    "add_rms_norm_fwd": ("x", "residual", "weight"),
    "causal_attention_fwd": ("q", "k", "v", "sinks"),
    "cross_entropy_fwd": ("logits",),
    "dropout": ("x",),
    "embedding_fwd": ("wte", "wpe"),
    "gelu_fwd": ("x", "bias"),
    "grouped_linear_fwd": ("x", "weight", "bias"),
    "layer_norm_fwd": ("x", "weight", "bias"),
    "linear_cross_entropy_fwd": ("hidden", "weight"),
    "linear_cross_entropy_total": ("hidden", "weight"),
    "linear_fwd": ("x", "weight", "bias"),
    "lora_linear_fwd": ("x", "weight", "bias", "a", "b"),
    "quantized_linear_fwd": ("x", "bias"),
    "relu_squared_fwd": ("x",),
    "rms_norm_fwd": ("x", "weight"),
    "rotary": ("x",),
    "swiglu_fwd": ("gate", "up"),
}
OTHERS = {
    *(name.replace("_fwd", "_bwd") for name in DIFFERENTIABLE if name.endswith("_fwd")),
    *(
        "cross_entropy_in_place",
        "dequantize_nf4",
        "dropout_mask",
        "gemm",
        "gemm_few",
        "grouped_gemm",
        "gemm_narrow",
        "quantized_decode",
        "linear_cross_entropy_scale",
        "sample",
        "sample_rows",
    ),
    "take_dropout",
}
VARIANTS: dict[str, dict[str, Any]] = {  # beside the calls of native_calls
    "add_layer_norm_fwd": {"x": lambda x: x.bfloat16(), "bias": None, "y_type": 1},
    "add_layer_norm_bwd": {"dy": lambda dy: dy.bfloat16(), "dtotal": None, "bias_type": -1, "dropout_p": 0.0},
    "add_rms_norm_fwd": {"x": lambda x: x.bfloat16(), "weight": None, "y_type": 1},
    "add_rms_norm_bwd": {"dy": lambda dy: dy.bfloat16(), "dtotal": None, "weight": None, "dropout_p": 0.0},
    "cross_entropy_in_place": {"dloss": None},
    "gelu_fwd": {"bias": None},
    "layer_norm_bwd": {"dy": lambda dy: dy.half(), "bias_type": -1},
    "layer_norm_fwd": {"y_type": 2},
    "linear_cross_entropy_total": {"want_weight": False},
    "rms_norm_bwd": {"dy": lambda dy: dy.half(), "weight": None},
    "rms_norm_fwd": {"weight": None, "y_type": 2},
    "rotary": {"positions": None, "interleaved": True, "inverse": True},
    "swiglu_bwd": {"up": None, "interleaved": True, "dout": lambda dout: dout[:, ::2]},
    "swiglu_fwd": {"up": None, "interleaved": True},
}
ALL_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def schemas() -> dict[str, str]:
    every = [*(s for part in _schemas.KERNELS.values() for s in part), *_schemas.CPU_LIBRARY, *_schemas.PYTHON]
    return {_schemas.name_of(schema): schema for schema in every if "Tensor" in schema}


def table(ops: Any) -> dict[str, dict[str, Any]]:
    """Arguments of calls; the name of a case begins with that of its operator."""
    found = calls(ops) | {"take_dropout": {"counter": 1, "n": 2, "site": 3, "device": torch.device("cpu")}}
    for name, changes in VARIANTS.items():
        changed = {key: new(found[name][key]) if callable(new) else new for key, new in changes.items()}
        found[f"{name} otherwise"] = found[name] | changed
    return found


def check(ops: Any, case: str) -> None:
    name = case.split()[0]
    arguments, wanted, given, named = table(ops)[case], DIFFERENTIABLE.get(name, ()), [], {}
    op = getattr(ops, name).default
    for argument in op._schema.arguments:
        value = arguments[argument.name]
        if argument.name in wanted:
            value = _leaf(value)
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            given.append(value)
    random = torch.Tag.nondeterministic_seeded in op.tags  # two calls give two results
    torch.library.opcheck(op, tuple(given), named, test_utils=ALL_TESTS[:-1] if random else ALL_TESTS)


def _leaf(value: Any) -> Any:
    if isinstance(value, list):
        return [_leaf(part) for part in value]
    return None if value is None else value.detach().clone().requires_grad_()


CASES = [case for case in table(torch.ops.gptfast) if case.split()[0] in schemas()] if has_cpu_ops else []


def test_every_operator_is_in_the_table():
    assert set(schemas()) == set(DIFFERENTIABLE) | OTHERS == {case.split()[0] for case in CASES}


def test_operators_have_derivatives():
    """Those that take part in training have one, their backward operators an error that says so."""
    writing = {name for name, schema in schemas().items() if "!)" in schema}
    constant = {
        "dequantize_nf4",
        "dropout_mask",
        "quantized_decode",
        "sample",
        "sample_rows",
        "take_dropout",
    }  # of integers, or integers
    assert set(_registry._derivatives) == set(schemas()) - writing - constant


@pytest.mark.parametrize("case", [case for case in CASES if case != "dequantize_nf4"])
def test_opcheck(case: str):
    """tests/triton/test_triton.py has what is a Triton kernel alone."""
    check(torch.ops.gptfast, case)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_the_operator(name: str):
    """Called by itself, an operator has the gradients that it has through `gptfast.ops`' autograd.Function, to the bit."""
    arguments, op = table(torch.ops.gptfast)[name], getattr(torch.ops.gptfast, name).default
    values = {a.name: arguments[a.name] for a in op._schema.arguments}
    found = []
    for call in (op, _eager_call(name)):
        leaves = {key: _leaf(value) if key in DIFFERENTIABLE[name] else value for key, value in values.items()}
        outputs = call(*leaves.values())
        first = outputs[0] if isinstance(outputs, tuple | list) else outputs
        first.backward(torch.linspace(-1, 2, first.numel()).view(first.shape))
        flat = [x for key in DIFFERENTIABLE[name] for x in (leaves[key] if key in ("a", "b") else [leaves[key]])]
        found.append([first.detach(), *(x.grad for x in flat)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def _eager_call(name: str) -> Any:
    if name == "linear_cross_entropy_total":
        total = import_module("gptfast.ops.linear_cross_entropy").TotalLossFunction
        return lambda *inputs: total.apply(*inputs[:-2])
    if name == "lora_linear_fwd":
        lora = import_module("gptfast.ops.lora_linear").LoRAFunction
        return lambda x, w, bias, a, b, *options: lora.apply(len(a), options, x, w, bias, *a, *b)
    return _registry._recorder(name, "gptfast", getattr(torch.ops.gptfast, name))
