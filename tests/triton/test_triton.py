"""The Triton kernels without a GPU: the op suite in Triton's interpreter, errors, tuning. tests/triton/test_triton_compile.py
compiles them; `make gpu-check` runs tests/triton/test_triton_on_gpu.py where there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import gptfast.triton
from gptfast import ops
from gptfast.backend import has_kernel, resolve
from tests.ops.test_every_op import HELPERS
from tests.support import ROOT
from tests.support.chosen_tests import passed

X = torch.ones(4)
BACKENDS = resolve.__globals__["_backends"]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only): pip install triton"
)

# What the interpreter runs of each file of the op suite. Left out: bfloat16, whose conversions it gets wrong (Triton 3.6 to
# 3.9 truncate instead of rounding); thousands of programs, a few milliseconds each; what reads integers of a GPU's memory to
# raise an error about them, which the Triton kernels leave out so as not to wait; repetition, as here a thread runs all; what
# is about the CUDA kernels, and would run on their emulator once more.
# Of products of parameters that take the same path through a kernel, each value once instead of each pair; few_heads is about
# the slices of the CPU's backward.
SUITE = {
    "gelu": "not 8300 and not repeatable",
    "layer_norm": "not 8300 and not 8200 and not repeatable and not few_rows and (not far_from_zero or 14.1 or 3000)",
    # it rounds to bfloat16 wrongly
    "rms_norm": "not repeatable and not few_rows and not as_torch_has_it and (not rounded_once or 64)",
    "relu_squared": "not repeatable",
    "swiglu": "not repeatable and not (every_tail and 2)",
    "rotary": "not repeatable and not IndexError and not on_a_gpu and (not every_number or -3)",
    "mixed_dtypes": "not a_bias_beyond or weight0",
    "dropout": "not half_a_unit and not repeatable",
    "cross_entropy": "not repeatable and not memory and not underflow and not not_rounded and not outside",
    "causal_attention": "not repeatable and not pure and not below_python and not T256D64 and not (T129D128 and fp32)"
    " and not few_heads and not (equal_scores and (dtype1-1 or dtype2 or dtype4))",
    "dequantize_nf4": "not errors",
    "quantized_linear": "not errors and (not identity or int8-32 or int4-64 or nf4-128 or mxfp4)",
    "embedding": "not 2049 and not IndexError and not long_runs and not on_cuda and not outside"
    " and (not parity or positions or 24 or 1032)",
    "sample": "[triton-1-fp32] or [triton-17-fp16] or [triton-100-fp32] or coordinates or unchanged or errors",
}


@needs_triton
@pytest.mark.slow
def test_the_op_suite_in_the_interpreter(tmp_path):
    """In one separate process: TRITON_INTERPRET=1 must be set before triton is imported."""
    chosen = {f"ops/test_{op}.py": f"not bf16 and ({tests})" for op, tests in SUITE.items()}
    found = passed(chosen, tmp_path, "-W", "ignore", TRITON_INTERPRET="1", GPTFAST_BACKEND="auto")
    assert {file: n for file, n in found.items() if n <= 20} == {}, "fewer tests than there are"


def interpreted(code: str) -> subprocess.CompletedProcess[str]:
    code = f"from tests.support import triton_interpreter; triton_interpreter.mend()\n{code}"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@needs_triton
def test_opcheck_of_what_triton_alone_has():
    code = """
import torch
import gptfast
from tests.ops.test_opcheck import check
for case in ("quantized_linear_fwd", "quantized_linear_bwd", "dequantize_nf4"):
    check(torch.ops.gptfast_triton, case)
"""
    result = interpreted(code)
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
def test_bits_are_the_cpus():
    """Dropout masks and samples in the interpreter are those of the CPU kernels, bit for bit."""
    code = """
import torch
from gptfast import ops
for C, p, seed, offset in ((1, 0.5, 0, 0), (70, 0.1, 2**64 - 1, 2**32 - 1), (1500, 0.3, 2**63 + 5, 7)):
    x = torch.ones(9, C)
    assert torch.equal(ops.dropout(x, p, seed, offset, backend="triton"), ops.dropout(x, p, seed, offset, backend="cpu"))
logits = torch.randn(3, 5003, generator=torch.Generator().manual_seed(1)) * 3
for options in ({}, {"top_k": 50}, {"top_p": 0.9, "temperature": 0.8}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.5}):
    key = {"seed": 2**63 + 1, "position": 2**32 - 1, "stream": torch.tensor([0, 7, 2**32 - 1])}
    ours, cpu = (ops.sample(logits, **options, **key, backend=name) for name in ("triton", "cpu"))
    assert torch.equal(ours, cpu), (options, ours, cpu)
rows = [{}, {"top_k": 50}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.5, "seed": 2**64 - 1}]
options, logits = torch.tensor([ops.row_options(**row) for row in rows]), logits[:1].repeat(4, 1)
ours, cpu = (ops.sample_rows(logits, options, position=3, backend=name) for name in ("triton", "cpu"))
assert torch.equal(ours, cpu), (ours, cpu)
options[2, 2] = -1
try:
    torch.ops.gptfast_triton.sample_rows(logits, options, torch.arange(4), torch.arange(4))
except RuntimeError as error:
    assert "options[2] are out of range" in str(error)
else:
    raise AssertionError("a nan is no top_p")
q, v = torch.zeros(2, 3, 40, 16), torch.eye(40, 16).expand(2, 3, 40, 16)  # the result is the kept part of the weights
masked = [
    ops.causal_attention(q, q, v, dropout_p=0.4, seed=2**40, offset=3, backend=name) != 0 for name in ("triton", "cpu")
]
assert torch.equal(*masked)
"""
    result = interpreted(code)
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
def test_what_is_not_finite_shows():
    """Values of visible keys that are inf or nan, in masked blocks too; ids and targets outside of their tables."""
    code = """
import torch
from gptfast import backend, ops
from gptfast.ops import reference
q, v = torch.zeros(1, 1, 70, 16), torch.ones(1, 1, 70, 16)
v[0, 0, 3, 0], v[0, 0, 65, 1], v[0, 0, 40, 2], v[0, 0, 66, 3] = float("inf"), float("-inf"), float("nan"), float("inf")
ours, exact = ops.causal_attention(q, q, v, backend="triton"), reference.causal_attention(q, q, v)
assert torch.equal(ours.isnan(), exact.isnan()) and torch.equal(ours.isinf(), exact.isinf())
torch.testing.assert_close(ours, exact, equal_nan=True)
with backend("triton"):
    rows = ops.embedding(torch.tensor([0, 2, -1, 3]), torch.ones(9, 4)[:3])
losses, _ = torch.ops.gptfast_triton.cross_entropy_fwd(torch.ones(3, 5), torch.tensor([0, 5, -1]), -100, 0.0)
assert rows.isnan().all(1).tolist() == [False, False, True, True], rows
assert losses.isnan().tolist() == [False, True, True], losses
"""
    result = interpreted(code)
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
@pytest.mark.slow
def test_decoding():
    """Few queries and many keys: the keys are split among programs, and a second kernel joins what they leave."""
    code = """
import torch
from gptfast.backend import AUTOMATIC
from gptfast.testing import Case, check_case
AUTOMATIC["cpu"] = ["triton"]
for dtype in (torch.float32, torch.float16):
    for B, T, S, D, options in (
        (1, 1, 1100, 16, {}),
        (1, 5, 1300, 40, {"window": 700, "dropout_p": 0.1, "seed": 3}),
        (2, 1, 530, 8, {"seq_lens": torch.tensor([0, 7])}),
        (1, 16, 513, 8, {"causal": False}),
    ):
        options = {"return_lse": True, **options}
        check_case(Case("causal_attention", {"B": B, "H": 1, "T": T, "S": S, "D": D}, options), dtype)
"""
    result = interpreted(code)
    assert result.returncode == 0, result.stderr[-3000:]


@needs_triton
@pytest.mark.slow
def test_attention_by_tma():
    """Tensor descriptors, which the interpreter has in Triton 3.6 and 3.9, too: head dims and lengths that are no
    multiples of a tile, strided inputs."""
    code = """
import torch
from tests.support.triton_targets import take_tma
from gptfast.backend import AUTOMATIC
from gptfast.testing import Case, check_case
from gptfast.triton import _attention
import pytest
AUTOMATIC["cpu"] = ["triton"]
_attention.has_tma = lambda: True
described = []
load = _attention.TensorDescriptor
_attention.TensorDescriptor = lambda *args: described.append(args) or load(*args)
take_tma(pytest.MonkeyPatch())
for T, S, D, layout, options in (
    (150, 150, 64, "strided", {"dropout_p": 0.1, "seed": 3}),
    (70, 150, 40, "contiguous", {"window": 50}),
    (5, 1100, 128, "contiguous", {"seq_lens": torch.tensor([600])}),
    (80, 80, 24, "contiguous", {"cu_seqlens": torch.tensor([0, 13, 70, 80])}),
):
    before = len(described)
    check_case(Case("causal_attention", {"B": 1, "H": 2, "T": T, "S": S, "D": D}, options, layout), torch.float16)
    assert len(described) - before == 3 + 5 + 4
"""
    result = interpreted(code)
    assert result.returncode == 0, result.stderr[-3000:]


def test_kernels_of_every_op():
    """Whatever has a CUDA kernel has a Triton kernel; linear is PyTorch's own on both."""
    assert all(has_kernel(op, "triton") for op in ops.__all__ if op not in HELPERS)


# ---- errors -------------------------------------------------------------------------------------------------------


def test_importing_gptfast_leaves_triton_alone():
    code = "import sys, gptfast; assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, gptfast
try: gptfast.ops.gelu(torch.ones(4), backend="triton")
except RuntimeError as error: print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = "gelu: backend='triton' was asked for, but Triton is not installed: pip install triton"
    assert result.stdout.startswith(said), result.stdout + result.stderr


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu():
    with pytest.raises(
        RuntimeError, match=r"but torch sees no GPU .*or set TRITON_INTERPRET=1 before importing gptfast"
    ):
        ops.gelu(X, backend="triton")


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(gptfast.triton, "missing_reason", None)
    monkeypatch.setattr(gptfast.triton, "_reasons", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    match = "this GPU has compute capability 6.1 and Triton needs 7.0 or newer; use backend='auto'"
    assert gptfast.triton.unavailable_reason(0) in match
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(RuntimeError, match=match):
        resolve("gelu", "triton", X)


def test_dtypes_and_devices(monkeypatch):
    monkeypatch.setattr(gptfast.triton, "missing_reason", None)
    monkeypatch.setattr(gptfast.triton, "_reasons", {0: None})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="gelu: backend='triton' was asked for, but the input is on cpu; move it"):
        resolve("gelu", "triton", X)
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], device="cpu"))
    with pytest.raises(
        TypeError, match=r"gelu: backend='triton' computes float32, bfloat16 and float16, got torch\.float64"
    ):
        resolve("gelu", "triton", X.double())


def test_auto_moves_on(monkeypatch):
    """To the Triton kernels where there is no CUDA library, and to eager PyTorch where they cannot run or are
    interpreted."""

    class OnAGpu:  # as much of a CUDA tensor as is looked at
        dtype, device, is_cpu = torch.float32, torch.device("cuda", 0), False

    monkeypatch.setitem(resolve.__globals__, "missing_cuda_reason", "not built")
    monkeypatch.setattr(gptfast.triton, "missing_reason", "no Triton")
    assert resolve("gelu", None, OnAGpu()) == "eager"
    monkeypatch.setattr(gptfast.triton, "missing_reason", None)
    monkeypatch.setattr(gptfast.triton, "_reasons", {0: None})
    assert resolve("gelu", None, OnAGpu()) == "triton"


# ---- tuning -------------------------------------------------------------------------------------------------------


@needs_triton
def test_tuning_measures_once_and_remembers(monkeypatch, tmp_path, capsys):
    from gptfast.triton import _tuning

    launched = []
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "_milliseconds", lambda run: (run(), 1.0 if launched[-1] == "second" else 2.0)[1])
    monkeypatch.setattr(_tuning, "_chosen", {})
    choice = ("kernel", (64, 128), ["first", "second", "third"], launched.append)
    assert _tuning.fastest(*choice) == "second" and launched == 2 * ["first", "second", "third"]
    assert "gptfast: kernel: tried 3 tilings" in capsys.readouterr().err
    monkeypatch.setattr(_tuning, "_chosen", {})  # another process
    assert _tuning.fastest(*choice) == "second" and len(launched) == 6
    assert list(json.loads((tmp_path / "triton_tiles.json").read_text()).values()) == [1]
    (tmp_path / "triton_tiles.json").write_text("{")
    monkeypatch.setattr(_tuning, "_chosen", {})
    monkeypatch.setattr(_tuning, "LIMIT_S", -1.0)  # time is up after one
    assert _tuning.fastest(*choice) == "first" and launched[6:] == ["first"]

    def fails(candidate: str) -> None:
        launched.append(candidate)
        if candidate == "second":
            raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(_tuning, "LIMIT_S", 30.0)
    assert _tuning.fastest("fails", (), ["first", "second", "third"], fails) == "first" and len(launched) == 12
    monkeypatch.setenv("GPTFAST_TRITON_TUNE", "0")
    assert _tuning.fastest("other", (), ["first", "second"], launched.append) == "first" and len(launched) == 12


@needs_triton
def test_tuning_keeps_what_two_measurements_agree_on(monkeypatch, tmp_path, capsys):
    """Noise would be kept in the file for ever: it decides nothing, and the next process measures again."""
    from gptfast.triton import _tuning

    times = iter([])
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "_milliseconds", lambda run: next(times))
    monkeypatch.setattr(_tuning, "_chosen", {})
    choice = ("kernel", (), ["first", "second", "third"], lambda candidate: None)
    times = iter([3, 1, 2, 3, 2, 1, 3, 1, 2, 1, 2, 3])  # second, third, second, first
    assert _tuning.fastest(*choice) == "first" and "the measurements disagree" in capsys.readouterr().err
    assert not (tmp_path / "triton_tiles.json").exists()
    assert _tuning.fastest(*choice) == "first", "measured once a process"
    monkeypatch.setattr(_tuning, "_chosen", {})
    times = iter([3, 1, 2, 3, 2, 1, 3, 2, 1])  # second, third, third
    assert _tuning.fastest(*choice) == "third" and "disagree" not in capsys.readouterr().err
    assert list(json.loads((tmp_path / "triton_tiles.json").read_text()).values()) == [2]


@needs_triton
def test_tables_of_codes_are_not_made_inside_a_capture(monkeypatch):
    """They would lie in the memory of the graph, and be filled only when it is replayed."""
    from gptfast.triton import _codes

    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(_codes, "_tables", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for table, name in ((_codes.nf4_table, "NF4"), (_codes.dynamic_table, "double quantisation")):
        with pytest.raises(
            RuntimeError, match=f"the table of {name} has not been made on cuda:7.*run the op once before"
        ):
            table(gpu)
    assert not _codes._tables
    with torch.inference_mode():
        made = _codes.nf4_table(torch.device("cpu"))
    assert not made.is_inference() and _codes.nf4_table(torch.device("cpu")) is made
