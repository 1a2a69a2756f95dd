"""The CUDA ops as they are built for GPUs: what nvcc makes of every kernel, what the library needs, and setup.py's errors.
Nothing here runs on a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, emulated
from tests.support.cuda_tools import functions

CUDA = ROOT / "csrc/cuda"
KERNELS = sorted(CUDA.glob("*.cu"))
WITH_PTX = {"mma.cuh", "hopper.cuh", "wgmma.cuh"}  # the only files that may hold inline assembly
pytestmark = pytest.mark.skipif(not KERNELS, reason="not run from the source tree")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, Path]:
    """What nvcc and ptxas said while the library was built for every GPU that it is shipped for, and the library.

    Without the PTX for newer GPUs, one of three passes: its code is that of sm_80, as a kernel asks for sm_90a or not at all
    (test_one_question_about_the_gpu), and test_cuda_archs has it made.
    """
    emulated.nvcc()
    folder = tmp_path_factory.mktemp("gpu")
    shutil.rmtree(ROOT / "build/objects/_cuda_ops", ignore_errors=True)  # say it all again
    env = {**os.environ, "GPTFAST_CUDA": "1", "NVCC_APPEND_FLAGS": "-Xptxas=-v", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr, folder / "gptfast/_cuda_ops.so"


@pytest.mark.slow
def test_kernels_compile_for_every_gpu_without_spills(built):
    """sm_80 (A100), sm_90a (H100, H200); nothing spilled, no wgmma serialised (C7510), no warning."""
    text, _ = built
    assert re.search(r"built the CPU ops .*; the CUDA ops \(sm_80, sm_90a; nvcc [\d.]+\)", text), text[-500:]
    assert "C7510" not in text and "C7519" not in text
    assert not re.findall(r".*\.cuh?\(\d+\): warning.*|ptxas.*warning.*", text)
    found = re.findall(r"entry function '(\S+)' for '(sm_\w+)'\n.*\n.* (\d+) bytes spill stores", text)
    assert {arch for _, arch, _ in found} == {"sm_80", "sm_90a"} and len(found) > 100
    assert not [(name, arch, n) for name, arch, n in found if n != "0"]


@pytest.mark.slow
def test_the_library_finds_torch_on_a_gpu_machine(built):
    """It links what leads to libtorch_cuda.so, and takes nothing of CUDA from there but the current stream."""
    if shutil.which("readelf") is None:
        pytest.skip("binutils is not installed")
    needed = subprocess.run(["readelf", "-d", built[1]], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in needed and "gomp" not in needed and "torch_python" not in needed
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", built[1]], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert not re.findall(r"U (cuda[A-Z]\w+|cu[A-Z]\w+|_ZN7gptfast\w+)", symbols), "the runtime is linked in"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "arch", "instructions", "variants"),
    [
        ("attention_forward_sm90", "sm_90a", ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"), 8),
        ("attention_backward_sm90", "sm_90a", ("HGMMA", "UTMALDG", "USETMAXREG"), 16),
        ("attention_forward", "sm_80", ("HMMA.16816", "LDSM", "LDGSTS"), 8),
        ("query_gradient", "sm_80", ("HMMA.16816", "LDSM", "LDGSTS"), 8),
        ("key_gradients", "sm_80", ("HMMA.16816", "LDSM", "LDGSTS"), 8),
    ],
)
def test_tensor_cores_and_copy_engines_are_used(kernel, arch, instructions, variants, built):
    """In every 16-bit variant of a kernel, as disassembled."""
    found = {
        name: text
        for name, text in functions(built[1], arch).items()
        if re.search(rf"\d{kernel}I", name) and re.search("bfloat16|6__half", name)
    }
    assert len(found) == variants, sorted(found)
    for name, text in found.items():
        assert not [i for i in instructions if i not in text], name


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"GPTFAST_CUDA": "yes"}, "GPTFAST_CUDA is 'yes'; expected auto, 0 or 1"),
        (
            {"GPTFAST_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "GPTFAST_CUDA=1, but nvcc was not found. Install the CUDA toolkit",
        ),
        (
            {"GPTFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.0 7.5"},
            "names 7.0, 7.5; gptfast's CUDA kernels need 8.0 or",
        ),
        ({"GPTFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "fast"}, "TORCH_CUDA_ARCH_LIST names 'fast'; expected a list"),
    ],
)
def test_settings_that_cannot_be(environment, match, tmp_path):
    if "TORCH_CUDA_ARCH_LIST" in environment:
        emulated.nvcc()
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"]
    env = {**os.environ, **environment}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and match in result.stderr, result.stderr[-1000:]


def test_inline_assembly_and_static_shared_memory_stay_where_they_belong():
    """PTX has its own files; shared memory is dynamic, because only that is poisoned and checked for races."""
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*.h")]:
        code = re.sub(r"//.*", "", path.read_text())
        assert path.name in WITH_PTX or not re.search(r"\basm\b", code), f"{path.name} holds inline assembly"
        assert path.name == "compat.cuh" or "__shared__" not in code, f"{path.name} has static shared memory"


def test_one_question_about_the_gpu():
    """Device code has two forms: of sm_90a and of all others. `built` compiles both."""
    asked = {}
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*.h")]:
        found = re.findall(r"__CUDA_ARCH\w*", re.sub(r"//.*", "", path.read_text()))
        asked |= {path.name: found} if found else {}
    assert asked == {"hopper.cuh": ["__CUDA_ARCH_FEAT_SM90_ALL", "__CUDA_ARCH__"]}  # the second: of a device at all


def test_kernels_have_no_float_atomics():
    """Deterministic by construction: the only atomic is an integer counter whose order cannot show."""
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]:
        for call in re.findall(r"atomic\w+\([^;]*;", path.read_text()):
            assert re.search(r", 1u\)", call), f"{path.name}: {call}"
