"""Where and when a figure was measured: commit, date, GPU, driver, versions."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import query

ROOT = Path(__file__).parent.parent.parent
KERNELS = ("csrc/cuda", "csrc/bindings", "gptfast/triton", "gptfast/ops")  # what a GPU's results are results of


def git(*arguments: str) -> str:
    """What git says of this source tree; "" where there is none."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def provenance() -> dict[str, Any]:
    """`kernels`: the last commit that changed them; "+" where they differ from what is committed."""
    real = torch.cuda.is_available()
    return {
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "kernels": git("log", "-1", "--format=%h", "--abbrev=12", "--", *KERNELS)
        + ("+" if git("status", "--porcelain", "--", *KERNELS) else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if real else "none",
        **(query("driver_version", "clocks.max.sm", "power.limit") if real else {}),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
