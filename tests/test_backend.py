"""The choice among backends: never silent, never falling back on an explicit request."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import gptfast
from gptfast import ops
from gptfast.backend import cpu_isa, cpu_isas, force_cpu_isa, resolve

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
def test_cuda_without_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="gelu: backend='cuda' was asked for, but torch sees no GPU"):
        ops.gelu(X, backend="cuda")


def test_an_op_without_a_kernel_says_so(emu):
    """The emulated CUDA kernels are a backend like others; this one is taken from it."""
    known = resolve.__globals__["_OPS"]["emu"]
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


@pytest.mark.parametrize(
    ("trouble", "match"),
    [
        (
            "GTX 1080 has compute capability 6.1; the kernels need 8.0 or newer",
            "but GTX 1080 has compute capability 6.1",
        ),
        ("_cuda_ops.so was not built", "but _cuda_ops.so was not built; use backend='auto'"),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels(trouble, match, monkeypatch):
    """Explicitly asked for it is an error with the cause; auto goes on in eager PyTorch."""
    monkeypatch.setitem(resolve.__globals__, "missing_cuda_reason", trouble)
    with pytest.raises(RuntimeError, match=match):
        resolve("gelu", "cuda", X)


def test_environment_is_checked_at_import():
    bad = python("import gptfast", GPTFAST_BACKEND="metal")
    assert bad.returncode and "GPTFAST_BACKEND: backend is 'metal'" in bad.stderr
    bad = python("import gptfast", GPTFAST_CPU_ISA="avx1024")
    assert bad.returncode and "GPTFAST_CPU_ISA is 'avx1024'; this machine runs scalar" in bad.stderr


def test_isa_can_be_forced():
    assert cpu_isa() == cpu_isas()[-1]
    for name in cpu_isas():
        code = "import gptfast; from gptfast.backend import cpu_isa; print(cpu_isa())"
        assert python(code, GPTFAST_CPU_ISA=name).stdout.strip() == name
        with force_cpu_isa(name):
            assert cpu_isa() == name
    assert cpu_isa() == cpu_isas()[-1]


def test_missing_library_is_said_once_and_eager_runs(tmp_path):
    """A copy of the package without _ops.so: what GPTFAST_BUILD=0 installs."""
    import shutil
    from pathlib import Path

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
    lines = result.stdout.splitlines()
    assert lines[:2] == ["True", "torch.Size([1, 1, 2, 4])"]
    assert lines[2].startswith("gelu: backend='cpu' was asked for, but _ops.so was not built")
