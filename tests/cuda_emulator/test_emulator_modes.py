"""The CUDA kernels on the emulator, in every mode: any order of warps, late and early copies, a smaller GPU, poisoned
results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops import RowNorm, linear_few, reference
from gptfast.testing import DTYPES, Case, cases, run
from tests.support import emulated
from tests.support.op_properties import bitwise
from tests.support.sass import MULTIPROCESSOR, SHARED_MEMORY

OPS = ["gelu", "dropout", "layer_norm", "add_layer_norm", "cross_entropy", "rms_norm", "add_rms_norm"]
OPS += ["relu_squared", "swiglu", "rotary"]
CASES = [case for op in OPS for case in cases(op)] + [
    Case("gelu", {"N": 300, "C": 8}),
    Case("layer_norm", {"N": 3, "C": 8200}),
    Case("add_layer_norm", {"N": 3, "C": 2051}, {"dropout_p": 0.2, "seed": 3}),
    Case("dropout", {"N": 5, "C": 1032}, {"p": 0.4, "seed": 3}),
    Case("rms_norm", {"N": 3, "C": 8200, "no_weight": 1}),
    Case("add_rms_norm", {"N": 3, "C": 2056}, {"dropout_p": 0.2, "seed": 3}),
]
MODES = [("forward", False), ("reverse", True), ("reverse", False), ("random", True), ("random", False)]


def emulated_run(case: Case, dtype: torch.dtype, order: str, lazy: bool) -> list[torch.Tensor]:
    emulated.configure(order, lazy, seed=7)
    result = run(getattr(ops, case.op), case, dtype)
    return result.outputs + result.grads


@pytest.mark.parametrize("dtype", [pytest.param(DTYPES[n], id=n) for n in ("fp32", "bf16")])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.id}")
def test_no_order_changes_a_bit(case, dtype, emu):
    """The results of a kernel without a race do not depend on who runs first."""
    first = emulated_run(case, dtype, "forward", True)
    assert not any(x.isnan().any() for x in first), "a value was not written"
    for order, lazy in MODES:
        for a, b in zip(first, emulated_run(case, dtype, order, lazy), strict=True):
            assert bitwise(a, b), (order, lazy)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 90, "top_p": 0.5}])
def test_no_order_changes_a_token(options, emu):
    for V in (700, 8700):  # a row in one block, and in parts
        logits = torch.randn(3, V).bfloat16()
        expected = reference.sample(logits, **options)
        for order, lazy in [("forward", True), *MODES]:
            emulated.configure(order, lazy, seed=7)
            assert torch.equal(ops.sample(logits, **options), expected), (V, order, lazy)


def test_no_order_changes_a_layer_of_few_rows(emu):
    x, weight, scale, shift, residual = (
        torch.randn(*shape).bfloat16() for shape in ((5, 640), (70, 640), (640,), (640,), (5, 70))
    )
    norm, found = RowNorm("layer_norm", scale, shift, 1e-5), []
    for order, lazy in [("forward", True), *MODES]:
        emulated.configure(order, lazy, seed=7)
        found.append(linear_few("emu", x, weight, None, norm=norm, activation="gelu", residual=residual))
    assert not found[0].isnan().any() and all(torch.equal(found[0], y) for y in found[1:])


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}])
def test_rows_that_do_not_fit_into_shared_memory(options, emu):
    """What a GPU with 48 KB a block does with fp32 logits of a large vocabulary: the same."""
    logits = torch.randn(2, 20000) * 3
    emulated.configure(smem=48 << 10)
    assert torch.equal(ops.sample(logits, **options), reference.sample(logits, **options))


def shared_memory_calls() -> dict[str, Callable[[], object]]:
    """A call of each kernel of the table, which is the last one of it that asks for more than 48 KB."""
    V, row = 50257, torch.zeros(1, dtype=torch.int64)

    def attention(D: int, **options: float) -> Tensor:
        q = torch.zeros(1, 1, 1, D, dtype=torch.bfloat16, requires_grad=True)
        return ops.causal_attention(q, q, q, **options)

    calls: dict[str, Callable[[], object]] = {
        "forward D=64 dropout": lambda: attention(64, dropout_p=0.1),
        "cross_entropy in place, bf16": lambda: torch.ops.gptfast_emu.cross_entropy_in_place(
            torch.zeros(1, V, dtype=torch.bfloat16), row, None, -100, 0.0
        ),
        "sample, bf16": lambda: ops.sample(torch.zeros(1, V, dtype=torch.bfloat16)),
        "sample, fp32": lambda: ops.sample(torch.zeros(1, V)),
    }
    for D in (64, 128):
        calls[f"forward D={D}"] = lambda D=D: attention(D)
        calls[f"backward D={D}"] = lambda D=D: attention(D).sum().backward()
    return calls


@pytest.mark.parametrize("kernel", SHARED_MEMORY)
def test_shared_memory(kernel, emu):
    """What a block asks for decides how many stay on a multiprocessor."""
    emulated.configure()
    shared_memory_calls()[kernel]()
    most, blocks = SHARED_MEMORY[kernel]
    assert most - (4 << 10) < emulated.shared_memory() <= most, "the table says what is used"
    assert blocks == MULTIPROCESSOR // (emulated.shared_memory() + 1024)


def test_new_tensors_are_full_of_nan(emu):
    """In every test on the emulator (the fixture `emu`), those of kernels too: a value that a kernel forgets shows."""
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
