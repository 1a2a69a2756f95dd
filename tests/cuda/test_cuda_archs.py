"""TORCH_CUDA_ARCH_LIST: what is built of it, and that the Hopper kernels of such a build have a body or cannot be
started."""

from __future__ import annotations

import functools
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tests.support import ROOT, emulated
from tests.support.cuda_tools import cuobjdump, functions

pytestmark = pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="not run from the source tree")
LISTS = {  # a list: what is compiled, what is left out
    "9.0": (["9.0a"], []),
    "9.0a": (["9.0a"], []),
    "8.0 9.0": (["8.0", "9.0a"], []),
    "9.0;9.0a": (["9.0a"], []),
    "9.0+PTX": (["9.0a", "9.0+PTX"], []),
    "8.0;9.0+PTX": (["8.0", "9.0a", "9.0+PTX"], []),
    "8.0;9.0a;9.0+PTX": (["8.0", "9.0a", "9.0+PTX"], []),
    "9.0a+PTX": (["9.0a", "9.0a+PTX"], []),
    "8.0+PTX": (["8.0", "8.0+PTX"], []),
    "5.2 7.0,7.5+PTX;8.0, 8.6": (["8.0", "8.6"], ["5.2", "7.0", "7.5+PTX"]),
    "7.5 8.0 8.6 9.0 10.0 12.0+PTX": (
        ["8.0", "8.6", "9.0a", "10.0", "12.0", "12.0+PTX"],
        ["7.5"],
    ),  # of container images
    "": (["8.0", "9.0a", "9.0+PTX", "10.0", "12.0", "12.0+PTX"], []),
    " ; ": (["8.0", "9.0a", "9.0+PTX", "10.0", "12.0", "12.0+PTX"], []),
}
TINY = """
#include "common.cuh"
#include "wgmma.cuh"
using namespace gptfast::cuda;
__global__ void HOPPER_BOUNDS(128) tiny_sm90(float* out, uint64_t a, uint64_t b) {
#if defined(GPTFAST_HOPPER)
  float c[8][4] = {};
  wgmma_fence();
  wgmma<bf16, 0, 0>(c, a, b, 1);
  wgmma_commit();
  wgmma_wait<0>();
  for (int n = 0; n < 8; n++) out[threadIdx.x * 8 + n] = c[n][0];
#else
  __trap();
#endif
}
"""


@functools.cache
def build() -> dict[str, Any]:
    """The functions of setup.py, and those that it calls."""
    original, setuptools.setup = setuptools.setup, lambda **options: None
    try:
        found = runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    from buildtools import libraries, toolchain

    return {**vars(toolchain), **vars(libraries), **found}


def flags(monkeypatch: pytest.MonkeyPatch, asked: str) -> list[str]:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    return build()["Cuda"](Path("nvcc"), Path("/"), "13.0", *build()["cuda_archs"]("13.0")).arch_flags()


def compile_with(options: list[str], source: Path, folder: Path) -> Path:
    command = [emulated.nvcc(), *build()["NVCC_FLAGS"], *options, f"-I{ROOT / 'csrc/cuda'}", "-fatbin", str(source)]
    out = folder / f"{source.stem}.fatbin"  # all code for GPUs, without the host's
    result = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return out


@pytest.mark.parametrize("asked", LISTS)
def test_what_is_built_of_a_list(asked, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build()["cuda_archs"]("13.0") == LISTS[asked]


@pytest.mark.parametrize(("release", "newest"), [("12.0", "9.0+PTX"), ("12.6", "9.0+PTX"), ("12.8", "12.0+PTX")])
def test_an_older_nvcc_builds_the_gpus_that_it_knows(release, newest, monkeypatch):
    """nvcc 12.8 is the first for 10.0 and 12.0."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build()["cuda_archs"](release)[0][-1] == newest


def test_gpus_that_are_left_out_are_reported(monkeypatch, capsys):
    """And the build continues; a list of nothing but old GPUs is an error (test_cuda_build)."""
    cuda = build()["Cuda"](Path("nvcc"), Path("/"), "13.0", ["8.0"], ["7.0", "7.5"])
    build()["say_what_was_built"](cuda, "")
    said = capsys.readouterr().out
    assert "TORCH_CUDA_ARCH_LIST names 7.0, 7.5: left out" in said and "the CUDA ops (sm_80; nvcc 13.0)" in said


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["9.0", "", "7.5 8.0 8.6 9.0 10.0 12.0+PTX"])
def test_hopper_code_of_a_list_is_not_empty(asked, monkeypatch, tmp_path):
    """Read from the machine code; there is no code of sm_90 without the "a" beside it. "" is every kind of code in one list:
    8.0, 9.0a and 9.0+PTX too."""
    source = tmp_path / "tiny.cu"
    source.write_text(TINY)
    library = compile_with(flags(monkeypatch, asked), source, tmp_path)
    [(_, text)] = functions(library, "sm_90a").items()
    assert "HGMMA" in text and "BPT.TRAP" not in text
    archs = {f"sm_{arch.replace('.', '')}" for arch in LISTS[asked][0] if "PTX" not in arch}
    assert set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf", str(library)))) == archs
    if "8.0" in asked:
        [(_, text)] = functions(library, "sm_80").items()
        assert "HGMMA" not in text and "BPT.TRAP" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_attention_fwd_sm90", "causal_attention_bwd_sm90", "quantized_linear_sm90"])
def test_kernels_without_a_body_trap(name, monkeypatch, tmp_path):
    """As compiled for sm_90, which setup.py never does: not a bare EXIT, and at most a warp may start."""
    options = ["-gencode=arch=compute_90,code=sm_90", "-gencode=arch=compute_90,code=compute_90"]
    library = compile_with(options, ROOT / f"csrc/cuda/{name}.cu", tmp_path)
    found = functions(library, "sm_90")
    assert len(found) >= 8 and all("BPT.TRAP" in text and "HGMMA" not in text for text in found.values())
    assert re.findall(r"\.maxntid (\d+)", cuobjdump("--dump-ptx", str(library))) == ["32"] * len(found)
