"""What this machine can do at most, measured now: arithmetic, memory, and which of its states it is in."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch

from gptfast.backend import cpu_isa, has_cpu_ops
from gptfast.cli.doctor import cpu_name
from gptfast.training.machine import peak_flops


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
        """With the larger of these limits and of what is measured now: other programs can only make them look small."""
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
