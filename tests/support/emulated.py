"""The backend "emu": the CUDA kernels, compiled by g++ with tests/cuda_emulator, as ops on CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gptfast import _schemas
from gptfast.backend import Backend, has_cpu_ops, register
from gptfast.ops._registry import register_properties
from tests.support import ROOT

NAMESPACE = "gptfast_emu"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


def has_kernel(op: str) -> bool:
    """Is there a CUDA kernel of this op to emulate?"""
    family = {"linear_cross_entropy": "cross_entropy", "add_layer_norm": "layer_norm", "add_rms_norm": "rms_norm"}.get(
        op, op
    )
    return has_cpu_ops and any((ROOT / f"csrc/cuda/{family}{part}.cu").exists() for part in ("", "_fwd"))


def build(variant: str = "plain") -> Path:
    """The library of one variant (plain, race, asan), brought up to date. Skips the test where it cannot be built."""
    if not (ROOT / "csrc/cuda").exists():
        pytest.skip("not run from the source tree")
    if not has_cpu_ops:
        pytest.skip("this install has no compiled ops")
    nvcc()
    command = [sys.executable, "setup.py", "-q", "build_emu", f"--variant={variant}"]
    with _one_at_a_time():
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return ROOT / f"build/emu/{variant}/emu_ops.so"


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Builds of several processes of pytest-xdist wait for each other."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/emu.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def nvcc() -> str:
    """The CUDA compiler. Skips the test where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("the CUDA toolkit is not installed: no nvcc, and no headers for the emulator")
    return found


def cuda_include() -> Path:
    """The folder of the toolkit's headers, according to nvcc."""
    command = [nvcc(), "--dryrun", "-c", "-x", "cu", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Path(re.search(r"_HERE_=(.+)", said)[1]).parent / "include"


@functools.cache
def load(variant: str | None = None) -> ctypes.CDLL:
    """Make backend="emu" available in this process. One variant a process: GPTFAST_EMU_VARIANT, or plain."""
    path = build(variant or os.environ.get("GPTFAST_EMU_VARIANT", "plain"))
    torch.ops.load_library(path)
    schemas = (*_schemas.compiled("cuda"), *_schemas.CUDA_KERNELS)
    _schemas.define(NAMESPACE, schemas)
    _schemas.check_library(NAMESPACE, "cpu", schemas, path)
    register_properties(NAMESPACE)
    register(Backend("emu", NAMESPACE, "cpu", lambda _: None, automatic=False))
    return ctypes.CDLL(str(path))


def configure(
    order: str = "forward",
    lazy: bool = True,
    seed: int = 1,
    smem: int = 0,
    hopper_code: bool = True,
    maps: bool = True,
) -> None:
    """How kernels run from now on: the order of warps and lanes, late or early asynchronous copies; and on which GPU: one of
    less shared memory, one for which the library has no code of sm_90a, or one whose driver makes no TMA maps."""
    load().gptfast_emu_configure(ORDERS[order], seed, int(lazy), int(lazy), smem)
    load().gptfast_emu_play(int(hopper_code), int(maps))


@contextmanager
def late(*tensors: torch.Tensor) -> Iterator[None]:
    """What kernels that start early find written only after they have waited for earlier kernels; nan until then."""
    announce = load().gptfast_emu_late
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    for storage in storages.values():
        announce(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()))
    try:
        yield
    finally:
        announce(None, ctypes.c_size_t(0))


def shared_memory() -> int:
    """Bytes of shared memory of the last kernel that requested more than 48 KB."""
    return load().gptfast_emu_shared_memory()
