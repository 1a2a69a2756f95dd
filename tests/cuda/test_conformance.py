"""Every wrapper of a PTX instruction (csrc/cuda/mma.cuh, hopper.cuh, wgmma.cuh) against a plain definition: on the emulator always,
on the GPU where there is one. Products are of small integers, so every order of summation gives the same bits."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import ROOT, emulated

SOURCE = ROOT / "tests/cuda_emulator/conformance.cu"
RNG = np.random.default_rng(0)


@functools.cache
def library(place: str) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str({"emulator": for_emulator, "gpu": for_gpu}[place]()))
    loaded.conformance.restype = ctypes.c_char_p
    return loaded


def built(name: str, flags: list[str], link: list[str], nvcc: str | None = None) -> Path:
    """The program as a library. It is compiled where it, its headers or the flags are other ones than the last time."""
    from buildtools.ninja_file import Library, Unit, run_ninja

    folder = ROOT / "build/conformance" / name
    unit = Unit(SOURCE, flags, "conformance.o", nvcc=Path(nvcc) if nvcc else None)
    run_ninja([Library("conformance.so", [unit], link)], folder, folder)
    return folder / "conformance.so"


def for_emulator() -> Path:
    emulator = ["-include", str(SOURCE.with_name("cuda_emulator.h")), "-x", "c++", f"-I{emulated.cuda_include()}"]
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-w", "-fPIC", "-fvisibility=hidden", *emulator]
    return built("emulator", flags, ["-lpthread", "-ldl"])


def gpu_flags(arch: str) -> list[str]:
    return ["-std=c++20", "-O2", "-Xcompiler=-fPIC", f"-gencode=arch=compute_{arch},code=sm_{arch}"]


def for_gpu() -> Path:
    major, minor = torch.cuda.get_device_capability()
    target = ROOT / "build/conformance/gpu.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = gpu_flags("90a" if major == 9 else f"{major}{minor}")
    command = [emulated.nvcc(), *flags, "-shared", str(SOURCE), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return target


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=NEEDS_GPU)])
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hopper(place: str) -> str:
    """Where the instructions of sm_90a run."""
    if place == "gpu" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU is no Hopper")
    return place


def call(
    place: str,
    name: str,
    x: np.ndarray,
    like: np.ndarray,
    options: tuple[int, ...] = (),
    before: np.ndarray | None = None,
) -> np.ndarray:
    """What the wrapper makes of the bits of x; as many as `like` has. `before`: what lies where it writes."""
    x, out = np.ascontiguousarray(x), np.full_like(like, 77) if before is None else before.copy()
    numbers = (ctypes.c_int * 16)(*options)
    pointers = x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)
    sizes = ctypes.c_size_t(x.nbytes), ctypes.c_size_t(out.nbytes)
    message = library(place).conformance(name.encode(), pointers[0], sizes[0], pointers[1], sizes[1], numbers)
    assert message == b"", message
    return out


def bits(n: int) -> np.ndarray:
    return RNG.integers(0, 2**32, n, dtype=np.uint32)


def integers(*shape: int) -> np.ndarray:
    return RNG.integers(-8, 9, shape).astype(np.float32)


def test_exp2(place):
    x = np.concatenate([RNG.uniform(-140, 10, 1020), [0, -np.inf, -1000, np.inf]]).astype(np.float32)
    expected, got = np.exp2(x.astype(np.float64)), call(place, "exp2", x, x)
    assert got[-1] == np.inf and (got[-3:-1] == 0).all()
    expected, got = expected[:-1], got[:-1]
    # the instruction's own bound, 2 units in the last place; results below the smallest normal number may become 0
    assert (np.abs(got - expected) <= 2**-22 * expected + 2.0**-126).all()


def test_tf32(place):
    x = bits(1024)
    x[np.isnan(x.view(np.float32))] = 0x7F800000
    expected = np.where(x & 0x7F800000 == 0x7F800000, x, (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    # the low bits, which mma ignores, are not specified
    assert (call(place, "tf32", x, x) & 0xFFFFE000 == expected & 0xFFFFE000).all()


@pytest.mark.parametrize("size", [4, 16])
def test_cp_async(size, place):
    x = bits(64 * size // 4).reshape(64, -1)
    expected = np.where(np.arange(64)[:, None] % 3 != 0, x, 0)
    assert (call(place, f"cp_async {size}", x, x) == expected).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed, place):
    x = bits(128).view(np.uint16).reshape(4, 8, 8)
    matrices = x.transpose(0, 2, 1) if transposed else x
    expected = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32).T  # lane l: row l // 4, pair l % 4
    got = call(place, "ldmatrix transposed" if transposed else "ldmatrix", x, bits(128)).reshape(32, 4)
    assert (got == expected).all()


@pytest.mark.parametrize(("name", "K"), [("bf16", 16), ("fp16", 16), ("tf32", 8)])
def test_mma(name, K, place):
    a, b, c = integers(16, K), integers(K, 8), integers(16, 8)
    got = call(place, f"mma {name}", np.concatenate([a.ravel(), b.ravel(), c.ravel()]), c)
    assert (got == a @ b + c).all()


@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("operand", ["shared 00", "shared 01", "shared 10", "shared 11", "registers 0", "registers 1"])
@pytest.mark.parametrize("N", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_wgmma(dtype, N, operand, add, hopper):
    a, b, c = integers(64, 64), integers(64, N), integers(64, N)
    x = np.concatenate([a.ravel(), b.ravel(), c.ravel()])
    got = call(hopper, f"wgmma {dtype} {N} {operand}", x, c, (add,))
    assert (got == a @ b + add * c).all()


CORNERS = [(0, 0, 0, 0), (64, 5, 2, 1), (8, 30, 1, 0), (64, 39, 2, 1)]
TMA_DTYPES = {"fp32": (0, torch.float32), "bf16": (1, torch.bfloat16), "fp16": (2, torch.float16)}


def swizzled(panel: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes, in which the chunks of 16 are permuted by the row's number modulo 8; its own inverse."""
    chunks = panel.view(np.uint8).reshape(len(panel), 8, 16)
    rows, places = np.arange(len(panel))[:, None], np.arange(8)[None]
    return np.ascontiguousarray(chunks[rows, places ^ rows % 8]).reshape(len(panel), 128).view(panel.dtype)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("rows", [8, 40, 128])
def test_tma(rows, corner, hopper):
    """A tile as it lies in shared memory, with zeros past the ends."""
    tensor = bits(2 * 3 * 40 * 52).view(np.uint16).reshape(2, 3, 40, 104)
    x, y, z, w = corner
    tile = np.zeros((rows, 64), np.uint16)
    inside = tensor[w, z, y : y + rows, x : x + 64]
    tile[: inside.shape[0], : inside.shape[1]] = inside
    got = call(hopper, "tma", tensor, tile, (104, 40, 3, 2, *corner, rows, 1))
    assert (got == swizzled(tile)).all()


@pytest.mark.parametrize("add", [0, 1], ids=["store", "add"])
@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("rows", [8, 40, 128])
@pytest.mark.parametrize("dtype", TMA_DTYPES)
def test_tma_store(dtype, rows, corner, add, hopper):
    """Only what lies inside the tensor is written. Sums are of small integers: no dtype rounds them."""
    number, kind = TMA_DTYPES[dtype]
    x, y, z, w = corner
    columns = 32 if dtype == "fp32" else 64
    tensor, tile = (torch.from_numpy(integers(*shape)).to(kind) for shape in ((2, 3, 40, 104), (rows, columns)))
    expected = tensor.clone()
    there = expected[w, z, y : y + rows, x : x + columns]
    inside = tile[: there.shape[0], : there.shape[1]]
    there.copy_(there + inside if add else inside)

    def raw(t: torch.Tensor) -> np.ndarray:
        return t.view(torch.int32 if dtype == "fp32" else torch.int16).numpy()

    options = (104, 40, 3, 2, *corner, rows, number, add)
    got = call(hopper, "tma store", swizzled(raw(tile)), raw(tensor), options, before=raw(tensor))
    assert torch.equal(torch.from_numpy(got).view(kind), expected)


def test_mbarrier(hopper):
    x = bits(5 * 32).reshape(5, 32)
    assert (call(hopper, "mbarrier", x, x, (5,)) == x[:, np.arange(32) ^ 1]).all()


def test_named_barrier_and_registers(hopper):
    x = bits(256)
    assert (call(hopper, "warpgroups", x, x) == x[::-1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_takes_the_same_program(arch):
    """So that a machine with a GPU does not find out first."""
    assert built(f"sm_{arch}", gpu_flags(arch), [], emulated.nvcc()).exists()
