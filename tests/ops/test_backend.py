"""The choice among backends: never silent, never falling back on an explicit request."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gptfast
from gptfast import ops
from gptfast.backend import Backend, cpu_isa, cpu_isas, force_cpu_isa, has_kernel, register, resolve
from tests.support import emulated

X = torch.ones(4)


def python(code: str, cwd: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False, cwd=cwd
    )


def test_auto_takes_the_kernels_where_they_can_run():
    assert resolve("gelu", None, X) == "cpu"
    assert resolve("gelu", None, X.double()) == "eager"
    assert resolve("gelu", None, X.to("meta")) == "eager"


def test_argument_beats_context_beats_environment():
    with gptfast.backend("eager"):
        assert resolve("gelu", None, X) == "eager"
        assert resolve("gelu", "cpu", X) == "cpu"
        with gptfast.backend("cpu"):
            assert resolve("gelu", None, X) == "cpu"
        assert resolve("gelu", None, X) == "eager"
    code = "import torch, gptfast; from gptfast.backend import resolve; print(resolve('gelu', None, torch.ones(1)))"
    assert python(code, GPTFAST_BACKEND="eager").stdout.strip() == "eager"


def test_the_choice_is_left_after_an_error_and_belongs_to_its_thread():
    with pytest.raises(KeyError), gptfast.backend("eager"):
        raise KeyError
    assert resolve("gelu", None, X) == "cpu"
    seen = []
    with gptfast.backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(resolve("gelu", None, X)))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.gelu(X, backend="triton"), RuntimeError, "backend='triton'"),
        (lambda: ops.gelu(X, backend="gpu"), ValueError, "gelu: backend is 'gpu'; expected one of auto, cpu"),
        (
            lambda: ops.gelu(X.double(), backend="cpu"),
            TypeError,
            "computes float32, bfloat16 and float16, got torch.float64",
        ),
        (lambda: ops.gelu(X.to("meta"), backend="cpu"), ValueError, "the input is on meta"),
        (lambda: gptfast.backend("fast").__enter__(), ValueError, "gptfast.backend: backend is 'fast'"),
        (
            lambda: force_cpu_isa("sse9").__enter__(),
            ValueError,
            "force_cpu_isa: 'sse9' cannot run here; available: scalar",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error_with_the_cause():
    with pytest.raises(RuntimeError, match="gelu: backend='cuda' was asked for, but torch sees no GPU"):
        ops.gelu(X, backend="cuda")


def test_an_op_without_a_kernel_is_an_error_with_the_cause(emu):
    """The emulated CUDA kernels are a backend like others; this one is taken from it."""
    known = resolve.__globals__["_ops"]["emu"]
    assert resolve("gelu", "emu", X) == "emu"
    known.discard("gelu")
    try:
        with pytest.raises(RuntimeError, match="gelu: backend='emu' was asked for, but it has no kernel for this op"):
            ops.gelu(X, backend="emu")
        assert resolve("gelu", None, X) == "cpu"  # auto goes on to the next
    finally:
        known.add("gelu")


@pytest.mark.parametrize("name", ["cpu", "emu"])
def test_a_whole_model_runs_under_an_explicit_backend(name, emu):
    """Ops that a backend leaves to PyTorch, such as linear, are no obstacle."""
    model = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=40, dropout=0.0))
    ids = torch.randint(40, (2, 9))
    with gptfast.backend("eager"):
        expected = model(ids[:, :-1], ids[:, 1:])[1]
    with gptfast.backend(name if name == "cpu" else "auto"):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


REASONS = {
    "GTX 1080 has compute capability 6.1; the kernels need 8.0 or newer": "but GTX 1080 has compute capability 6.1",
    "no kernel image is available for execution on the device": "but no kernel image is available",
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_gpu_that_cannot_run_the_kernels(reason, monkeypatch):
    """An explicit request is an error with cause and remedy; auto runs eager PyTorch; doctor reports why."""
    from gptfast.cli.doctor import report

    names = resolve.__globals__
    monkeypatch.setitem(names, "missing_cuda_reason", None)
    monkeypatch.setitem(names, "_cuda_reasons", {0: reason})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
    with pytest.raises(RuntimeError, match=f"gelu: .*{REASONS[reason]}.*; use backend='auto' or 'eager'"):
        resolve("gelu", "cuda", x)
    assert resolve("gelu", None, x) == "eager"
    assert dict(report())["ops on CUDA"] == f"a GPU: every op in eager PyTorch, because {reason}"

    monkeypatch.setitem(names, "_cuda_reasons", {0: None})
    monkeypatch.setitem(names, "_ops", {**names["_ops"], "cuda": {"gelu"}})
    assert resolve("gelu", None, x) == "cuda"
    assert resolve("dropout", None, x) == "eager" and resolve("gelu", None, x.double()) == "eager"


def test_a_cuda_library_that_was_not_built(monkeypatch):
    monkeypatch.setitem(resolve.__globals__, "missing_cuda_reason", "_cuda_ops.so was not built")
    with pytest.raises(RuntimeError, match=r"but _cuda_ops\.so was not built; use backend='auto'"):
        resolve("gelu", "cuda", X)


def test_a_backend_registers_itself(monkeypatch):
    """`auto` tries backends in the order of their registration, each only where it can run."""
    names = resolve.__globals__
    for name, value in {"_backends": dict(names["_backends"]), "_ops": dict(names["_ops"]), "AUTOMATIC": {}}.items():
        monkeypatch.setitem(names, name, value)
    reasons = {"first": "it rests", "second": None, "quiet": None}
    for name in reasons:
        register(Backend(name, "gptfast", "cpu", lambda _, name=name: reasons[name], automatic=name != "quiet"))
    assert names["AUTOMATIC"] == {"cpu": ["first", "second"]} and has_kernel("gelu", "quiet")
    assert resolve("gelu", None, X) == "second" and resolve("gelu", "quiet", X) == "quiet"
    with pytest.raises(RuntimeError, match="gelu: backend='first' was asked for, but it rests; use backend='auto'"):
        resolve("gelu", "first", X)

    class OnAGpu:  # as much of a CUDA tensor as is looked at
        dtype, device, is_cpu = torch.float32, torch.device("cuda", 1), False

    here = {0: None, 1: "too old"}
    for name, reason in {"picky": here.get, "any": lambda _: None}.items():
        register(Backend(name, "gptfast", "cuda", reason))
        monkeypatch.setitem(names["_ops"], name, {"gelu"})
    assert resolve("gelu", None, OnAGpu()) == "any", "each call asks the GPU of its tensors"
    OnAGpu.device = torch.device("cuda", 0)
    assert resolve("gelu", None, OnAGpu()) == "picky"


def test_a_call_that_the_cuda_kernels_refuse(emu):
    """Each names the op, what is wrong and the remedy."""
    q = torch.zeros(1, 1, 40, 128)
    with pytest.raises(TypeError, match=r"gelu: backend='emu' computes .*, got torch.float64; use backend='eager'"):
        ops.gelu(X.double(), backend="emu")
    with pytest.raises(ValueError, match="gelu: backend='emu' was asked for, but the input is on meta; move it"):
        ops.gelu(X.to("meta"), backend="emu")
    with pytest.raises(ValueError, match="head_dim is 300; expected 1 to 256 - use more heads"):
        ops.causal_attention(*[torch.zeros(1, 1, 4, 300)] * 3, backend="emu")
    emulated.configure(smem=50 << 10)  # less shared memory than any GPU has that the kernels support
    with pytest.raises(RuntimeError, match=r"causal_attention: the CUDA launch failed: an emulated error\. .*doctor"):
        ops.causal_attention(q, q, q, backend="emu")


def test_out_of_memory_names_what_was_requested(emu):
    """The words that trainers look for, before they try a smaller batch."""
    wide = torch.empty(1, 1 << 20).expand(1 << 28, 1 << 20)
    said = r"gelu: CPU out of memory: no room for a tensor of shape \(268435456, 1048576\); use a smaller batch"
    with pytest.raises(RuntimeError, match=said):
        ops.gelu(wide, backend="emu")
    columns = torch.empty(1 << 20, 1).expand(1 << 20, 1 << 28)  # must be copied first
    with pytest.raises(RuntimeError, match="gelu: CPU out of memory"):
        ops.gelu(columns, backend="emu")


def test_environment_is_checked_at_import():
    bad = python("import gptfast.ops", GPTFAST_BACKEND="metal")
    assert bad.returncode and "GPTFAST_BACKEND: backend is 'metal'" in bad.stderr
    bad = python("import gptfast.ops", GPTFAST_CPU_ISA="avx1024")
    assert bad.returncode and "GPTFAST_CPU_ISA is 'avx1024'; this machine runs scalar" in bad.stderr


def best_isa_by_linux() -> str:
    """The best instruction set that kernels are compiled for, by what Linux says of this CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    pairs = {"avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed = {
        "amx": {"amx_tile", "amx_bf16", "amx_int8", *pairs},
        "avx512_bf16": pairs,
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"},
    }
    return next((name for name, of in needed.items() if of <= flags), "scalar")


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="asks Linux on x86-64")
def test_the_best_isa_of_the_machine_runs():
    """In the ops, and of the engine's own table: a compiler whose cpuid test says no runs scalar code without a word."""
    from gptfast import _C

    best = best_isa_by_linux()
    code = "import gptfast; from gptfast.backend import cpu_isa; print(cpu_isa())"
    assert python(code, GPTFAST_CPU_ISA="").stdout.strip() == best
    assert _C.checksum([], 1, best) == _C.checksum([], 1, "scalar")


def test_isa_can_be_forced():
    assert cpu_isa() == cpu_isas()[-1]
    for name in cpu_isas():
        with force_cpu_isa(name):
            assert cpu_isa() == name
    code = "import gptfast; from gptfast.backend import cpu_isa; print(cpu_isa())"
    for name in cpu_isas()[:2]:  # neither is the best, where there are three; the variable takes all names in one way
        assert python(code, GPTFAST_CPU_ISA=name).stdout.strip() == name
    assert cpu_isa() == cpu_isas()[-1]


def test_a_missing_library_is_reported_once_and_eager_runs(tmp_path):
    """A copy of the package without _ops.so: what GPTFAST_BUILD=0 installs."""
    import shutil

    package = Path(gptfast.__file__).parent
    shutil.copytree(package, tmp_path / "gptfast", ignore=shutil.ignore_patterns("*.so", "__pycache__", "assets"))
    code = (
        "import torch, gptfast; x = torch.ones(3)\n"
        "print(gptfast.ops.gelu(x).sum().item() > 2)\n"
        "q = torch.ones(1, 1, 2, 4); print(gptfast.ops.causal_attention(q, q, q).shape)\n"
        "try: gptfast.ops.gelu(x, backend='cpu')\n"
        "except RuntimeError as error: print(error)"
    )
    result = python(code, cwd=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert result.stderr.count("every op runs in eager PyTorch") == 1, result.stderr
    assert "<string>:2: RuntimeWarning: gptfast: _ops.so was not built" in result.stderr  # the user's line
    lines = result.stdout.splitlines()
    assert lines[:2] == ["True", "torch.Size([1, 1, 2, 4])"]
    assert lines[2].startswith("gelu: backend='cpu' was asked for, but _ops.so was not built")
