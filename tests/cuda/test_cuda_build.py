"""The CUDA ops as they are built for GPUs: what nvcc makes of every kernel, what the library needs, and setup.py's errors.
Nothing here runs on a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import ROOT, emulated
from tests.support.cuda_tools import functions, nvcc_flags
from tests.support.nvcc_messages import keeping_nvcc, said
from tests.support.sass import BWD, REGISTERS, WAIT_FOR_SCORES, WARPGROUPS, Code, code_of

CUDA = ROOT / "csrc/cuda"
KERNELS = sorted(CUDA.glob("*.cu"))
WITH_PTX = {
    "mma.cuh",
    "hopper.cuh",
    "wgmma.cuh",
    "bits.cuh",
    "overlap.cuh",
}  # the only files that may hold inline assembly
pytestmark = pytest.mark.skipif(not KERNELS, reason="not run from the source tree")


# One front-end pass, which is most of the time of a unit, and its PTX assembled for two GPUs.
TWO_GPUS = "-gencode=arch=compute_80,code=sm_90"  # beside the sm_80 of TORCH_CUDA_ARCH_LIST
VERBOSE = "-Xptxas=-v"


def included(path: Path) -> set[str]:
    """Names of the headers of csrc/cuda that a file reaches."""
    names = {name for name in re.findall(r'#include "([^"/]+)"', path.read_text()) if (CUDA / name).exists()}
    return names.union(*(included(CUDA / name) for name in names))


# These have a form of their own for sm_90a.
HOPPER = [path for path in KERNELS if included(path) & {"hopper.cuh", "overlap.cuh"}]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[str, Path]:
    """What nvcc and ptxas said of the library's units, and the library: for sm_80, and the same PTX for sm_90.

    For sm_90a setup.py runs the front end again, which makes other PTX of the units in `HOPPER` alone; see `hopper`. Without
    the PTX for newer GPUs: test_cuda_archs has it made. Units that have not changed are not compiled again.
    """
    nvcc = keeping_nvcc(emulated.nvcc(), VERBOSE, TWO_GPUS)
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}"]
    env = {**os.environ, "GPTFAST_CUDA": "1", "CUDA_HOME": str(nvcc.parents[1]), "TORCH_CUDA_ARCH_LIST": "8.0"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert re.search(r"built the CPU ops .*; the CUDA ops \(sm_80; nvcc [\d.]+\)", result.stdout + result.stderr), (
        result.stdout[-500:]
    )
    objects = [ROOT / f"build/objects/_cuda_ops/csrc/cuda/{source.stem}.o" for source in KERNELS]
    return said(objects), folder / "gptfast/_cuda_ops.so"


@pytest.fixture(scope="module")
def hopper() -> tuple[str, list[Path]]:
    """What nvcc and ptxas said about the units of sm_90a, and their objects."""
    from buildtools.ninja_file import Library, Unit, run_ninja

    nvcc = keeping_nvcc(emulated.nvcc(), VERBOSE)
    flags = [*nvcc_flags(), "-gencode=arch=compute_90a,code=sm_90a"]
    units = [Unit(source, flags, f"{source.stem}.o", nvcc=nvcc) for source in HOPPER]
    place = ROOT / "build/sm_90a"
    run_ninja([Library("kernels.so", units)], place, place)
    objects = [place / unit.object for unit in units]
    return said(objects), objects


@pytest.mark.slow
def test_kernels_compile_for_every_gpu_without_spills(built, hopper):
    """A100, H100 and H200; nothing spilled, no warning, and nothing that ptxas calls a loss: wgmma serialised for whatever
    cause, or setmaxnreg ignored."""
    text = built[0] + hopper[0]
    assert not re.findall(r".*(?i:performance loss).*", text)
    assert not re.findall(r".*\.cuh?\(\d+\): warning.*|ptxas.*warning.*", text)
    found = re.findall(r"entry function '(\S+)' for '(sm_\w+)'\n.*\n.* (\d+) bytes spill stores", text)
    count = Counter(arch for _, arch, _ in found)
    assert count.keys() == {"sm_80", "sm_90", "sm_90a"} and count["sm_80"] == count["sm_90"] > 100
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
        ("quantized_products_sm90", "sm_90a", ("HGMMA", "UTMALDG", "USETMAXREG"), 32),
        ("quantized_products_sm80", "sm_80", ("HMMA.16816", "LDSM", "LDGSTS"), 16),
        ("quantized_rows", "sm_80", ("HMMA.16816", "LDG.E.EF.128"), 16),
        ("attention_forward", "sm_80", ("HMMA.16816", "LDSM", "LDGSTS"), 8),
        ("query_gradient", "sm_80", ("HMMA.16816", "LDSM", "LDGSTS"), 8),
        ("key_gradients", "sm_80", ("HMMA.16816", "LDSM", "LDGSTS"), 8),
    ],
)
def test_tensor_cores_and_copy_engines_are_used(kernel, arch, instructions, variants, built, hopper):
    """In every 16-bit variant of a kernel, as disassembled."""
    binaries = hopper[1] if arch == "sm_90a" else [built[1]]
    found = {
        name: text
        for binary in binaries
        for name, text in functions(binary, arch).items()
        if re.search(rf"\d{kernel}I", name) and re.search("bfloat16|6__half", name)
    }
    assert len(found) == variants, sorted(found)
    for name, text in found.items():
        assert not [i for i in instructions if i not in text], name


@pytest.mark.slow
@pytest.mark.parametrize("kernel", WARPGROUPS, ids=lambda k: k.id)
def test_main_loops_of_hopper(kernel, hopper):
    """As disassembled: the order of exponentials and waits, the distance of products, no value loaded by itself."""
    binary = next(path for path in hopper[1] if path.stem == kernel.unit)
    found = [t for name, t in functions(binary, "sm_90a").items() if kernel.variant in name]
    assert len(found) == 2, "bfloat16 and float16"
    for code in map(code_of, found):
        loop = code.loop(WAIT_FOR_SCORES if kernel.under_products else "HGMMA")
        assert loop.count("HGMMA") == kernel.products
        assert not loop.count(r"(LDS|LDG)\S*\.[US]16"), "16-bit values loaded one by one"
        assert loop.widest_gap() <= kernel.gap and loop.count("R2UR") <= kernel.moves
        if kernel.under_products:
            assert code.under_products(r"MUFU\.EX2") >= kernel.under_products, "the softmax waits for the products"


@pytest.mark.slow
def test_delta_waits_for_memory_once(hopper):
    """In the kernel of dq on Hopper a lane asks for all of both its queries' out and dout before it uses any: a chunk of each for
    every 32 columns."""
    binary = next(path for path in hopper[1] if path.stem == BWD)
    found = {name: code_of(text).loads_at_once() for name, text in functions(binary, "sm_90a").items()}
    for D, loads in ((64, 8), (128, 16)):
        ours = [n for name, n in found.items() if re.search(f"Li{D}ELb0EEELb", name)]
        assert len(ours) == 4 and min(ours) >= loads, (D, ours)


@pytest.mark.slow
def test_registers(built, hopper):
    """What a block needs decides how many run at a time."""
    found = re.findall(r"entry function '(\S+)' for '(sm_\w+)'\n.*\n.*\n.*Used (\d+) registers", built[0] + hopper[0])
    for pattern, arch, most in REGISTERS:
        used = [int(n) for name, of, n in found if of == arch and re.search(pattern, name)]
        assert used and max(used) <= most, (pattern, arch, used)


@pytest.mark.slow
def test_rows_are_asked_for_at_once(built):
    """Kernels bound by memory: a thread's part of a row, of x and of the residual, is on its way before the first value is used,
    with few rows also its part of weight and bias, and so are the next row of a norm's backward, four heads of rotary, two rows
    of an activation, eight rows of an embedding's gradient, four keys and values of a decoding
    step (two of fp32), the weights of a layer of few rows, and four parts of the logits that are sampled. One after the
    other, each would wait for memory by itself."""
    count = Counter()
    for name, text in functions(built[1], "sm_80").items():
        if found := re.search(r"norm_fwd_kernelI(.*)Li[48]ELi(\d)ELi\d+EE", name):
            kernel, wanted = "forward", int(found[2]) * (1 if "None" in found[1] else 2)
        elif found := re.search(r"norm_few_kernelILb(\d)E(.*)Li[48]EE", name):
            kernel, wanted = "few rows", (2 if "None" in found[2] else 3) + int(found[1])
        elif found := re.search(r"norm_bwd_kernelI.*Li[48]ELi(\d)ELi[1-9]\d*EE", name):
            kernel, wanted = "backward", 2 * int(found[1])
        elif found := re.search(r"rotary_kernelI.*Li[48]ELb([01])", name):
            kernel, wanted = "rotary", 4 if found[1] == "1" else 7
        elif re.search(r"swiglu_kernelI.*Li[48]ELb0ELb", name):
            kernel, wanted = "swiglu", 3
        elif re.search(r"swiglu_kernelI.*Li[24]ELb1ELb", name):
            kernel, wanted = "swiglu in pairs", 4
        elif re.search(r"activation_(f|b)wd_kernelI.*Li[48]EE", name):
            kernel, wanted = "activation", 2
        elif re.search(r"embedding_bwd_kernelI.*Li[48]E", name):
            kernel, wanted = "embedding", 8
        elif found := re.search(r"linear_few_kernelI.*Li(\d+)EEE", name):
            kernel, wanted = "few rows of a layer", int(found[1])
        elif "attend_split" in name:
            kernel, wanted = "decoding", 8
        elif "sample_kernel" in name or "sample_part_kernel" in name:
            kernel, wanted = "sampling", 4
        else:
            continue
        if "Any" in name:  # values of a dtype that is known at run time only
            continue
        count[kernel] += 1
        assert code_of(text).loads_at_once() >= wanted, name
    rows = {"forward": 40 + 49, "backward": 7 + 22, "few rows": 16}  # LayerNorm, RMSNorm
    pointwise = {"rotary": 10, "swiglu": 6, "swiglu in pairs": 6, "activation": 18}
    decoding = {"decoding": 24, "few rows of a layer": 8, "sampling": 6}
    assert count == {**rows, **pointwise, **decoding, "embedding": 3}


@pytest.mark.slow
def test_what_comes_before_the_wait_for_earlier_kernels(built, hopper):
    """Kernels of a decoding step ask for weights, or for keys and values, and then wait; they store nothing before, and let the
    next kernel start after it. The machine code lies in the order in which it runs. Kernels for other GPUs have no wait, by which
    `can_overlap` knows them: they are PTX of 8.0."""
    count = Counter()
    for binary in hopper[1]:
        for name, text in functions(binary, "sm_90a").items():
            code = code_of(text)
            waits, starts = (
                [n for n, x in enumerate(code.instructions) if x.startswith(kind)] for kind in ("ACQBULK", "PREEXIT")
            )
            layer = re.search(r"linear_few_kernelI.*Li(\d+)EEE", name)
            if not layer and "attend_split" not in name:
                assert not waits and not starts, name
                continue
            before = Code(code.instructions[: waits[-1]], ())
            assert len(waits) == 2 and len(starts) == 1 and starts[0] > waits[-1], name
            assert before.count(r"LDG\.E\.(EF\.)?128") >= (int(layer[1]) if layer else 8), name
            assert not before.count("STG|ST\\.|RED|ATOM"), name
            count["layer" if layer else "attention"] += 1
    assert count == {"layer": 8, "attention": 24}
    assert not any("ACQBULK" in text for arch in ("sm_80", "sm_90") for text in functions(built[1], arch).values())


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
    """Device code has two forms: of sm_90a, which `hopper` compiles, and of all others, which `built` compiles. But for
    the kernels that overlap: those of all GPUs from 9.0 on have the form of sm_90a."""
    asked = {}
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*.h")]:
        found = re.findall(r"__CUDA_ARCH\w*", re.sub(r"//.*", "", path.read_text()))
        asked |= {path.name: found} if found else {}
    assert asked == {
        "hopper.cuh": ["__CUDA_ARCH_FEAT_SM90_ALL", "__CUDA_ARCH__"],  # the second: of a device at all
        "overlap.cuh": ["__CUDA_ARCH__", "__CUDA_ARCH__"],  # of a device, and of which
    }
    assert [path.stem for path in HOPPER] == [
        *("causal_attention_bwd_sm90", "causal_attention_fwd_sm90", "decode_attention", "linear_few"),
        "quantized_linear_sm90",
    ]


def test_kernels_have_no_float_atomics():
    """Deterministic by construction: the only atomics add integers, whose order cannot show."""
    for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]:
        for call in re.findall(r"atomic\w+\([^;]*;", path.read_text()):
            assert re.fullmatch(r"atomicAdd\((counter|s\.listed|&s\.\w+\[b\]), (1u|word|carry)\).*;", call), (
                f"{path.name}: {call}"
            )
