"""FLOPs by torch's counter: those of eager PyTorch, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import gptfast
from gptfast import GPT, GPTConfig, ops
from gptfast.ops._flops import FORMULAS

# Operators without a matrix product, and what is no operator on tensors of a model.
NO_PRODUCT = {
    f"{op}_{way}"
    for op in ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "gelu", "swiglu", "relu_squared")
    for way in ("fwd", "bwd")
}
NO_PRODUCT |= {f"{op}_{way}" for op in ("embedding", "cross_entropy") for way in ("fwd", "bwd")}
NO_PRODUCT |= {
    "cross_entropy_in_place",
    "rotary",
    "linear_cross_entropy_scale",
    "dequantize_nf4",
    "dropout",
    "dropout_mask",
    "take_dropout",
}
NO_PRODUCT |= {
    "sample",
    "sample_rows",
    "keep_results",
    "peak_flops",
    "quantized_decode",
    "signal_ns",
    "cpu_isa",
    "cpu_isas",
    "cpu_rejected_isa",
    "set_cpu_isa",
}


def flops(function: Callable[[], object], backend: str) -> int:
    with gptfast.backend(backend), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.1, "activation": "relu", "attention_pattern": "alternating", "window": 8}],
    ids=["plain", "other"],
)
def test_a_model_has_those_of_eager(options: dict[str, object], grad: bool):
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=100, block_size=64, **options))
    ids = torch.randint(100, (2, 48))

    def step() -> None:
        with torch.set_grad_enabled(grad):
            loss = model(ids, ids)[1]
            if grad:
                loss.backward()

    assert flops(step, "cpu") == flops(step, "eager") > 0


def test_one_row_and_decoding():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=100, block_size=64)).eval()
    ids = torch.randint(100, (1, 1))
    assert flops(lambda: model(ids), "cpu") == flops(lambda: model(ids), "eager") > 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False), (False, False)])
def test_the_loss(wanted: tuple[bool, bool], reduction: str):
    hidden, weight = torch.randn(40, 16), torch.randn(50, 16)
    targets = torch.randint(50, (40,))

    def step() -> None:
        inputs = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight), wanted, strict=True)]
        loss = ops.linear_cross_entropy(*inputs, targets, reduction=reduction).sum()
        if loss.requires_grad:
            loss.backward()

    assert flops(step, "cpu") == flops(step, "eager")


def test_a_loss_without_gradients_computes_none():
    """Of parameters too, whose requires_grad stays true under no_grad."""
    hidden, weight = torch.randn(40, 16), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (40,))
    with torch.no_grad():
        assert flops(lambda: ops.linear_cross_entropy(hidden, weight, targets), "cpu") == 2 * 40 * 16 * 50
    with torch.inference_mode():
        assert flops(lambda: ops.linear_cross_entropy(hidden, weight, targets), "cpu") == 2 * 40 * 16 * 50


@pytest.mark.parametrize(("format", "columns"), [("int8", 64), ("q4", 32)])
def test_quantised_weights_count_as_the_matrix_that_they_stand_for(format: str, columns: int):
    op = torch.ops.gptfast_triton

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = meta(48, columns, dtype=torch.int8 if format == "int8" else torch.uint8)
    with FlopCounterMode(display=False) as counter:
        op.quantized_linear_fwd(meta(5, 64), codes, meta(48, 2), None, format, 32)
    assert counter.get_total_flops() == 2 * 5 * 64 * 48
    with FlopCounterMode(display=False) as counter:
        op.quantized_linear_bwd(meta(5, 48), codes, meta(48, 2), format, 32, 64)
    assert counter.get_total_flops() == 2 * 5 * 64 * 48


def test_low_rank_updates_count():
    x, w = torch.randn(20, 8, requires_grad=True), torch.randn(6, 8)
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.lora_linear(x, w, updates=[ops.LowRank(a, b, first=4, last=14)]).sum().backward()
    base, update = 2 * 20 * 8 * 6, 2 * 10 * 3 * (8 + 6)
    assert counter.get_total_flops() == 2 * base + 3 * update


def test_every_operator_has_a_formula_or_no_product():
    """A new operator has to say which: torch counts 0 where it finds no formula."""
    import gptfast.triton  # noqa: F401  registers its operators

    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(("gptfast::", "gptfast_triton::"))
    }
    assert registered >= set(FORMULAS) and not NO_PRODUCT & set(FORMULAS)
    assert registered - set(FORMULAS) <= NO_PRODUCT
    for name in FORMULAS:
        for space in (torch.ops.gptfast, torch.ops.gptfast_triton):
            if hasattr(space, name):
                assert getattr(space, name) in flop_registry, name
