"""The Triton kernels on a real GPU: parity over the shared case table, bits equal to the CPU's, repetition, decoding. All of
it is skipped where torch sees no GPU; `make gpu-check` runs it."""

from __future__ import annotations

import pytest
import torch

from gptfast import backend, ops
from gptfast.backend import has_kernel
from gptfast.testing import CASES, Case, cases, check_case, dtypes, run
from tests.support.op_properties import bitwise

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
ALL = [case for op in CASES if has_kernel(op, "triton") and op != "sample" for case in cases(op)]
DECODING = [
    Case("causal_attention", {"B": 2, "H": 3, "T": 1, "S": 3000, "D": 64}),
    Case("causal_attention", {"B": 2, "H": 3, "T": 5, "S": 1300, "D": 40}, {"window": 700}),
]


@pytest.fixture(autouse=True)
def _on_triton():
    with backend("triton"):
        yield


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", ALL + DECODING, ids=lambda c: f"{c.op}-{c.id}")
def test_parity(case, dtype):
    check_case(case, dtype, device="cuda")


@pytest.mark.parametrize("tiling", range(5))
@pytest.mark.parametrize("case", cases("causal_attention") + DECODING, ids=lambda c: c.id)
def test_every_tiling_of_attention(case, tiling, monkeypatch):
    """Whatever the tuner may choose, by TMA too where the GPU has it."""
    from gptfast.triton import causal_attention, causal_attention_bwd

    for module in (causal_attention, causal_attention_bwd):
        monkeypatch.setattr(module, "fastest", lambda kernel, kind, blocks, launch: blocks[tiling % len(blocks)])
    check_case(case, torch.bfloat16, device="cuda")


@pytest.mark.parametrize("case", ALL, ids=lambda c: f"{c.op}-{c.id}")
def test_repeats_bit_for_bit(case):
    first, again = (run(getattr(ops, case.op), case, torch.bfloat16, device="cuda") for _ in range(2))
    assert all(bitwise(a, b) for a, b in zip(first.outputs + first.grads, again.outputs + again.grads, strict=True))


@pytest.mark.parametrize("C", [1, 7, 104, 1032])
def test_dropout_mask_is_the_cpus(C):
    keep = ops.dropout_mask((1, 33, C), 0.3, seed=2**63 + 1, offset=2**32 - 1)[0]
    x = torch.ones(33, C, device="cuda")
    assert torch.equal((ops.dropout(x, 0.3, 2**63 + 1, 2**32 - 1) != 0).cpu(), keep)


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9, "temperature": 0.8}, {"temperature": 0.0}])
@pytest.mark.parametrize("V", [1, 63, 700, 50257])
def test_samples_are_the_cpus(V, options):
    """Scores differ in the last bits (the logarithm), so two tokens swap once in some 10^5 draws."""
    logits = torch.randn(64, V).bfloat16() * 3
    expected = ops.sample(logits, seed=3, **options, backend="cpu")
    assert (ops.sample(logits.cuda(), seed=3, **options).cpu() != expected).sum() <= 1
