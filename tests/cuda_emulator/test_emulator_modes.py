"""The CUDA kernels on the emulator, in every mode: any order of warps, late and early copies, a smaller GPU, poisoned
results; then once more with the race checker and with AddressSanitizer, in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import DTYPES, Case, cases, check_case, run
from tests.support import ROOT, emulated
from tests.support.op_properties import bitwise

OPS = ["gelu", "dropout", "layer_norm", "add_layer_norm", "cross_entropy"]
CASES = [case for op in OPS for case in cases(op)] + [
    Case("gelu", {"N": 300, "C": 8}),
    Case("layer_norm", {"N": 3, "C": 8200}),
    Case("add_layer_norm", {"N": 3, "C": 2051}, {"dropout_p": 0.2, "seed": 3}),
    Case("dropout", {"N": 5, "C": 1032}, {"p": 0.4, "seed": 3}),
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
    for order, lazy in MODES:
        for a, b in zip(first, emulated_run(case, dtype, order, lazy), strict=True):
            assert bitwise(a, b), (order, lazy)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 90, "top_p": 0.5}])
def test_no_order_changes_a_token(options, emu):
    logits = torch.randn(3, 700).bfloat16()
    for order, lazy in [("forward", True), *MODES]:
        emulated.configure(order, lazy, seed=7)
        assert torch.equal(ops.sample(logits, **options), reference.sample(logits, **options)), (order, lazy)


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}])
def test_rows_that_do_not_fit_into_shared_memory(options, emu):
    """What a GPU with 48 KB a block does with fp32 logits of a large vocabulary: the same."""
    logits = torch.randn(2, 20000) * 3
    emulated.configure(smem=48 << 10)
    assert torch.equal(ops.sample(logits, **options), reference.sample(logits, **options))


def test_every_result_is_written(emu):
    """New tensors are full of nan here; a value that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for case in CASES:
            check_case(case, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)


def parity_passes(variant: str, **environment: str) -> None:
    """The parity tests of every op, on another build of the emulator."""
    emulated.build(variant)
    files = [
        f"tests/ops/test_{op}.py" for op in ("gelu", "dropout", "layer_norm", "cross_entropy", "sample", "embedding")
    ]
    chosen = "emu and (test_parity or reference or aligned_width) and not 50257 and not N65C768 and not N6V2049"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *files, "-k", chosen]
    env = {**os.environ, "GPTFAST_EMU_VARIANT": variant, **environment}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.slow
def test_without_races():
    parity_passes("race")


@pytest.mark.slow
def test_without_a_byte_too_far():
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # torch's libraries were not built for it: leaks and mixed allocators of theirs are not the question here
    options = "detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1"
    parity_passes("asan", LD_PRELOAD=runtime.stdout.strip(), ASAN_OPTIONS=options)
