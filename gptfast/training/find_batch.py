"""The largest batch of one pass that fits into memory, found by passes of growing size."""

from __future__ import annotations

import gc
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from gptfast.machine import choose_dtype, resolve_device
from gptfast.models import GPT
from gptfast.training.config import TrainConfig
from gptfast.training.gradients import accumulate_gradients
from gptfast.training.optim import build_optimizers, parameters_of
from gptfast.training.ranks import Ranks
from gptfast.training.sensors import peak, resident

_USE = 0.9  # of the memory that is free; the rest is for evaluations, checkpoints and what else grows
_CGROUPS = (  # limit, use
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc")
COPIES = {"adamw": 2, "muon": 2, "lion": 1}  # numbers of an optimizer's state for each trained one, at most


def fitted(model: GPT, config: TrainConfig, ranks: Ranks | None = None) -> tuple[TrainConfig, str]:
    """The configuration with the largest batch_size that fits, and as many passes as make the same step; and a sentence.

    Sizes are doubled, as far as they divide batch_size * grad_accum. On a GPU a size fits if its pass does not run out of
    memory; on a CPU, where that would end the process, if the growth of the passes before says that it stays within
    nine tenths of what is free. The optimizer's state and the average of the weights are counted in. Where steps grow from
    batch_warmup_from tokens, a pass has no more.

    Args:
        model: float32; it keeps its weights, its gradients are deleted.
        config: of the run.
        ranks: all of them take the size that fits everywhere.
    Raises:
        MemoryError: not even the smallest fits.
        ValueError: the ranks have a part of the model each.
        NotImplementedError: a CPU whose system does not tell the memory of a process.
    """
    if ranks is not None and ranks.sharding:
        raise ValueError(
            "train: `find_batch_size` needs the whole model in each process; leave it out with `parallel` fsdp"
        )
    device, size = (resolve_device("train", config.device), 1) if ranks is None else (ranks.device, ranks.size)
    trial, sizes = _Trial(model.to(device), config, device), _sizes(config.rows_per_step // size)
    if config.batch_warmup_tokens:  # the first step is one pass
        most = config.batch_warmup_from // (trial.block_size * size)
        sizes = [rows for rows in sizes if rows <= max(1, most)]
    found = trial.largest(sizes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1)
    if ranks is not None:
        found = int(min(row[0] for row in ranks.exchange([found], "the search for a batch size")))
    if not found:
        raise MemoryError(
            f"train: not enough memory for a pass of {sizes[0]} row(s) of {trial.block_size} tokens; take a smaller model, "
            "or a smaller `block_size`"
        )
    batch = found * size
    passes = config.rows_per_step // batch
    larger = "the largest that fits"
    if found == sizes[-1]:
        larger = "all of a step" if passes == 1 else "as many as `batch_warmup_from` has"
    text = f"{batch} rows a pass, {larger}; {passes} passes a step (`batch_size` {batch}, `grad_accum` {passes})"
    return config.replace(batch_size=batch, grad_accum=passes), text


def _sizes(rows: int) -> list[int]:
    """Divisors of `rows`, each at least twice the one before; the last is `rows`."""
    found = [1]
    for n in range(2, rows + 1):
        if rows % n == 0 and n >= 2 * found[-1]:
            found.append(n)
    if found[-1] != rows:
        found[-1] = rows
    return found


class _Trial:
    """Passes of a model."""

    def __init__(self, model: GPT, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.block_size = config.block_size or model.config.block_size
        trained = parameters_of(build_optimizers(model, config))
        copies = COPIES[config.optimizer] + bool(config.ema)
        self.gradients = sum(p.numel() * p.element_size() for p in trained)  # bytes
        self.later = copies * self.gradients  # bytes that the first step adds

    def largest(self, sizes: list[int], sharers: int) -> int:
        """The largest size that fits, 0 if none does. sharers: processes that share the memory."""
        step, was_training = self.model.dropout_step, self.model.training
        self.model.train().recompute = self.config.recompute
        try:
            with torch.random.fork_rng(devices=[]):  # where dropout draws from torch's generator
                return self._on_gpu(sizes) if self.device.type == "cuda" else self._on_cpu(sizes, sharers)
        finally:
            if self.model.dropout_seed is not None:
                self.model.dropout_step = step
            self.model.zero_grad(set_to_none=True)
            self.model.train(was_training)

    def _on_gpu(self, sizes: list[int]) -> int:
        found = 0
        reserved = None
        with suppress(torch.OutOfMemoryError):
            reserved = torch.empty(self.later, dtype=torch.uint8, device=self.device)
            for size in sizes:
                self._pass(size)
                found = size
        del reserved
        self.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return found

    def _on_cpu(self, sizes: list[int], sharers: int) -> int:
        start = resident()
        if start is None:
            raise NotImplementedError("train: `find_batch_size` needs /proc on a CPU; choose `batch_size` yourself")
        free = _USE * free_memory() / sharers - self.later
        used: list[tuple[int, int]] = []  # size, bytes of its pass beyond the start
        for size in sizes:
            if used and self._expected(used, size) > free:
                break
            _forget_peak()
            try:
                self._pass(size)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and not any(text in str(error).lower() for text in _NO_MEMORY):
                    raise
                break
            used.append((size, max(0, (peak() or 0) - start)))
            if used[-1][1] > free:
                used.pop()
                break
        return used[-1][0] if used else 0

    def _expected(self, used: list[tuple[int, int]], size: int) -> float:
        """Bytes of a pass of `size` rows, on the line through the last two sizes; no row is the gradients alone."""
        last, most = used[-1]
        before, less = used[-2] if len(used) > 1 else (0, self.gradients)
        return most + (size - last) * max(0, most - less) / (last - before)

    def _pass(self, rows: int) -> None:
        """Forward and backward of random ids, beside whole gradients as in a step of several passes."""
        ids = torch.randint(
            self.model.config.vocab_size, (rows, self.block_size), generator=torch.Generator().manual_seed(0)
        )
        accumulate_gradients(self.model, [(ids, ids)], self._autocast, self.device)
        gc.collect()

    def _autocast(self) -> AbstractContextManager:
        name = choose_dtype(self.device)[0] if self.config.dtype == "auto" else self.config.dtype
        return nullcontext() if name == "float32" else torch.autocast(self.device.type, dtype=getattr(torch, name))


def free_memory() -> int:
    """Bytes that processes can still get: of the system, and of the group whose memory is limited."""
    free = _available()
    for limit, used in _CGROUPS:
        with suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, free)


def _available() -> int:
    with open("/proc/meminfo") as file:
        (line,) = (line for line in file if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])


def _forget_peak() -> None:
    """Let the system measure the peak of this process anew; where it may not be, peaks grow with the sizes anyway."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
