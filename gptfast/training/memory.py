"""What a step needs of memory, told before the first one: a batch that cannot fit would end the process without a word."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from gptfast.machine import choose_dtype
from gptfast.models import BERT, GPT
from gptfast.training.config import TrainConfig
from gptfast.training.find_batch import COPIES, free_memory
from gptfast.training.ranks import Ranks
from gptfast.training.simulate import activations

_MOST = 100  # numbers that a layer keeps for each of the residual stream's: more than any does
_IDS = 16  # bytes of a token's id and target
_REMEDY = (
    "take fewer rows a pass (batch_size) with more passes a step (grad_accum), shorter ones (block_size), or recompute"
)


def look_at_memory(
    model: GPT | BERT, config: TrainConfig, device: torch.device, block_size: int, ranks: Ranks | None = None
) -> str:
    """A sentence about the memory that a step needs, where it is more than half of what is free; "": it is less, or not known.

    What is counted is needed at least: weights, gradient, optimizer's state, average, ids, and what a pass keeps for its backward
    pass, measured on a narrow model. Buffers of the backward pass come to it, and what the allocator holds in holes.

    Args:
        model: float32. config: of the run. device: where it is trained. block_size: T.
        ranks: the processes that share a batch, or None.
    Raises:
        MemoryError: the machine has less than that in all.
    """
    known = _memory(device)
    if known is None:
        return ""
    free, total = known
    parts = 1 if ranks is None or not ranks.sharding else ranks.size
    shares, tensor = (1, 1) if ranks is None else (ranks.shares, ranks.tensor)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters()) // parts
    later = trained * (1 + COPIES[config.optimizer] + bool(config.ema)) // parts
    rows = config.batch_size // shares
    kept = _IDS * rows * config.grad_accum * block_size
    tokens = rows * block_size * model.config.n_embd * 4 // tensor
    if later + kept + tokens * _MOST * (1 + model.config.n_layer) < free / 2:
        return ""
    with torch.random.fork_rng(devices=[]):  # the small models that are measured draw weights
        shape = model.config.replace(block_size=block_size)
        dtype = choose_dtype(device)[0] if config.dtype == "auto" else config.dtype
        kept += activations(shape, rows, getattr(torch, dtype), config.recompute) // tensor
    each = f"{_gb(later)} for gradient and optimizer, {_gb(kept)} for a pass of {rows:,} rows of {block_size:,} tokens"
    if weights + later + kept > total:
        raise MemoryError(
            f"Trainer: a step needs at least {_gb(weights + later + kept)} ({each}), but there are {_gb(total)} in all; {_REMEDY}"
        )
    need = f"at least {_gb(later + kept)} ({each})"
    if later + kept > free:
        return f"{need}, and only {_gb(free)} are free: the system may end the run; {_REMEDY}"
    return f"{need} of the {_gb(free)} that are free" if later + kept > free / 2 else ""


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e9:.2g} GB"


def _memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that this process can still get, and that there are in all; None: the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        return free_memory() // processes, _total() // processes
    except (OSError, ValueError):  # no /proc
        return None


def _total() -> int:
    """Bytes of memory and swap, or fewer that the group of this process may have."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total = sum(1024 * int(fields[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total
