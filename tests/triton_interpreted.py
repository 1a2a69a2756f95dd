"""The op suite on the Triton kernels in Triton's interpreter. tests/test_triton.py runs this file in a process of its own,
where TRITON_INTERPRET=1 is set before triton is imported: in this one everything that calls Triton is interpreted."""

from __future__ import annotations

import pytest
import torch
from triton.runtime import interpreter

from gptfast.backend import AUTOMATIC, resolve
from gptfast.testing import CASES, cases, check_case

OPS = ["gelu", "layer_norm", "add_layer_norm", "dropout", "cross_entropy", "linear_cross_entropy", "causal_attention"]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")]


def _let_numbers_be_indices() -> None:
    """Triton 3.6 takes int() of arrays of one element, which numpy 2.4 refuses; newer versions squeeze them first."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


_let_numbers_be_indices()


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTOMATIC, "cpu", ["triton"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for op in OPS for c in cases(op)], ids=lambda c: f"{c.op}-{c.id}")
def test_parity(case, dtype):
    assert resolve(case.op, None, torch.ones(1)) == "triton"
    check_case(case, dtype)
