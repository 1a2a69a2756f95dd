"""Memory and temperature of the machine, for the log. What a machine does not tell is left out."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from sys import platform

import torch

_SYS = Path("/sys/class")
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "x86_pkg_temp", "cpu-thermal", "acpitz")


def machine_figures(device: torch.device) -> dict[str, float]:
    """Figures of this process and this machine, at most a millisecond's work and without a wait for the device.

    memory_gb, peak_memory_gb: resident memory of this process now, and the most so far. gpu_memory_gb, gpu_peak_memory_gb: of
    tensors on the device. cpu_temperature, gpu_temperature: the hottest sensor in degrees Celsius. 1 GB is 10**9 bytes.
    """
    figures = {name: value / 1e9 for name, value in (("memory_gb", resident()), ("peak_memory_gb", peak())) if value}
    if device.type == "cuda":
        figures["gpu_memory_gb"] = torch.cuda.memory_allocated(device) / 1e9
        figures["gpu_peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if (found := gpu_temperature(device)) is not None:
            figures["gpu_temperature"] = found
    if (found := cpu_temperature()) is not None:
        figures["cpu_temperature"] = found
    return {name: round(value, 3) for name, value in figures.items()}


def resident() -> int | None:
    """Bytes of memory that this process holds now; None: not known."""
    return _status("VmRSS")


def peak() -> int | None:
    """The most bytes of memory that this process held so far; None: not known."""
    if platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # elsewhere it counts the parent's before an exec too
    return _status("VmHWM")


def _status(key: str) -> int | None:
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return None


def cpu_temperature(sys: Path = _SYS) -> float | None:
    """Degrees Celsius of the CPU's hottest sensor; None: it has none that the system shows."""
    found = [value / 1000 for file in _cpu_sensors(sys) if (value := _number(file)) is not None]
    return max((value for value in found if -50 < value < 200), default=None)


@cache
def _cpu_sensors(sys: Path) -> tuple[Path, ...]:
    """The files of the CPU's sensors, in thousandths of a degree."""
    return tuple(_find_cpu_sensors(sys))


def _find_cpu_sensors(sys: Path) -> Iterator[Path]:
    for folder in sorted(sys.glob("thermal/thermal_zone*")):
        if _text(folder / "type").startswith(_CPU_SENSORS):
            yield folder / "temp"
    for folder in sorted(sys.glob("hwmon/hwmon*")):
        if _text(folder / "name").startswith(_CPU_SENSORS):
            yield from sorted(folder.glob("temp*_input"))


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text().strip()
    return ""


def _number(file: Path) -> float | None:
    with suppress(OSError, ValueError):
        return float(file.read_text())
    return None


def gpu_temperature(device: torch.device) -> float | None:
    """Degrees Celsius of a GPU, from the driver's library; None: it does not tell."""
    library = _nvml()
    if library is None:
        return None
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle, degrees = ctypes.c_void_p(), ctypes.c_uint()
    if library.nvmlDeviceGetHandleByUUID(identity, ctypes.byref(handle)):
        return None
    return None if library.nvmlDeviceGetTemperature(handle, 0, ctypes.byref(degrees)) else float(degrees.value)


@cache
def _nvml() -> ctypes.CDLL | None:
    """NVIDIA's management library, which comes with the driver; None: there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
