"""This machine: its name, its device and the dtype of its products, and its limits, measured now."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from gptfast.backend import BFLOAT16_ISAS, cpu_isa, has_cpu_ops

_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
_GPU_TERAFLOPS = {  # in the name of a GPU: dense bfloat16 with fp32 sums, float32 without TF32; NVIDIA's data sheets
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 66.9),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "A40": (149.7, 37.4),
    "RTX A6000": (154.8, 38.7),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except FileNotFoundError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@cache
def has_amx() -> bool:
    """Whether this CPU, its system and torch have AMX, with which oneDNN multiplies bfloat16 in whole tiles."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def bfloat16_instructions() -> str | None:
    """The instructions of this CPU that multiply bfloat16 faster than float32, as far as they are used here, or None."""
    if has_amx():
        return "AMX"
    isa = cpu_isa() if has_cpu_ops else "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else None
    return BFLOAT16_ISAS.get(isa or "")


def resolve_device(owner: str, name: str) -> torch.device:
    """The device of a name: auto, cpu, cuda, cuda:1, ...

    Args:
        owner: begins the messages.
        name: of the device; "auto": cuda where there is a GPU.
    Raises:
        ValueError: another name, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{owner}: device is {name!r}; expected 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{owner}: device is {name!r}, but PyTorch sees {torch.cuda.device_count()} GPUs; use 'cpu'")
    return device


_peaks: dict[tuple[torch.dtype, str, int], float] = {}


def peak_flops(dtype: torch.dtype, device: torch.device | str = "cpu", again: bool = False) -> float:
    """Flop/s limit of matrix products in `dtype`: the largest of all measurements in this process, each of about 0.2 s.

    A GPU that the table of data sheets has is not measured. A measurement takes the best of a large matrix product in torch
    and, on the CPU, of multiply-adds on registers that touch no memory (bfloat16 pairs where the CPU has them). A program cannot get past the larger of the two; but what
    else runs on the machine can make the measurement too small.

    Args:
        dtype: torch.float32 or torch.bfloat16.
        device: where.
        again: measure once more, where this was asked before with as many threads.
    """
    key = (dtype, str(torch.device(device)), torch.get_num_threads())
    if again or key not in _peaks:
        _peaks[key] = max(_peaks.get(key, 0.0), _measure_peak(dtype, key[1]))
    return _peaks[key]


def published_peak(name: str, dtype: torch.dtype) -> float | None:
    """Flop/s of a GPU's products as its maker gives them; None: the table has not this GPU, or another arithmetic is on.

    Args:
        name: as torch gives it, such as "NVIDIA H100 80GB HBM3".
        dtype: torch.float32 or torch.bfloat16.
    """
    if "Laptop" in name or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return None
    words = f" {name} ".replace("-", " ")
    for card, (bf16, fp32) in _GPU_TERAFLOPS.items():
        if f" {card} " in words:
            return 1e12 * (bf16 if dtype == torch.bfloat16 else fp32)
    return None


def _measure_peak(dtype: torch.dtype, device: str) -> float:
    if device.startswith("cuda"):
        published = published_peak(torch.cuda.get_device_name(device), dtype)
        return published or _gemm_flops(dtype, device)
    peak = _gemm_flops(dtype, device)
    if has_cpu_ops and device == "cpu":
        pairs = dtype == torch.bfloat16
        peak = max([peak] + [torch.ops.gptfast.peak_flops(500_000, pairs) for _ in range(5)])
    return peak


def _gemm_flops(dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.1) -> float:
    """Flop/s of the best of several square matrix products in torch, after one to warm up."""
    device = torch.device(device)
    n = _SIZE[device.type]
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    _timed_product(a, b)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        best = min(best, _timed_product(a, b))
    return 2 * n**3 / best


def _timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def choose_dtype(device: torch.device | str = "cpu") -> tuple[str, str]:
    """("bfloat16" or "float32", the reason in words): bfloat16 where the device has instructions for its products.

    Never by a clock: two runs of one command have the same dtype, whatever else the machine does.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):  # the question is of the current GPU
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "this GPU has it") if native else ("float32", "this GPU has no bfloat16")
    instructions = bfloat16_instructions()
    return ("bfloat16", f"this CPU has {instructions}") if instructions else ("float32", "no fast bfloat16 here")


@dataclass(frozen=True)
class Machine:
    """Limits of the CPU with the current number of threads."""

    name: str
    threads: int
    isa: str
    torch: str
    fp32_gflops: float  # of products, all threads
    bf16_gflops: float  # the same in bf16; equal to fp32 where the CPU has no instructions for it
    copy_gbs: float  # read + written bytes of a large copy
    signal_ns: float  # one signal between two threads; a shared machine drifts between states minutes long

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def peak(self, dtype: torch.dtype) -> float:
        """Flop/s limit of products in `dtype` (fp16 is computed in fp32)."""
        return (self.bf16_gflops if dtype == torch.bfloat16 else self.fp32_gflops) * 1e9

    def measured_again(self) -> Machine:
        """A copy with the larger of these limits and of new measurements: other programs can only make them too small."""
        now = measure_machine()
        names = ("fp32_gflops", "bf16_gflops", "copy_gbs")
        return replace(self, **{name: max(getattr(self, name), getattr(now, name)) for name in names})


def measure_machine() -> Machine:
    """Measure the limits; takes about a second."""
    probe = torch.ops.gptfast
    peaks = [peak_flops(dtype, again=True) / 1e9 for dtype in (torch.float32, torch.bfloat16)]
    signal = min(probe.signal_ns(5000) for _ in range(5)) if has_cpu_ops else 0.0
    return Machine(
        name=cpu_name(),
        threads=torch.get_num_threads(),
        isa=cpu_isa() or "eager",
        torch=torch.__version__,
        fp32_gflops=peaks[0],
        bf16_gflops=peaks[1],
        copy_gbs=_copy_bandwidth(),
        signal_ns=signal,
    )


def _copy_bandwidth(megabytes: int = 256) -> float:
    x = torch.zeros(megabytes * 2**18)
    y = torch.empty_like(x).copy_(x)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(times) / 1e9
