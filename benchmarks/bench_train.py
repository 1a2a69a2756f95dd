"""The step of `gptfast train` with GPT-2 124M, end to end, beside the least that it can take, in turns.

    python benchmarks/bench_train.py [--rounds 5] [--dtype bfloat16] [--cpu-time]

The whole step is that of the command with its defaults and TensorBoard: loader, forward, backward, clipping, AdamW, log, memory,
temperature, speed. The least is forward and backward of the same network and batch, and AdamW's pass at the measured bandwidth of
memory: 28 bytes a weight. Parts are measured inside the same steps; the log is written at every step here, by default at each tenth.
--cpu-time: on a machine with other work, with OMP_NUM_THREADS=1: CPU seconds of this process instead of wall-clock ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gptfast
from gptfast.benchmarking import measure_machine
from gptfast.training import TrainConfig, Trainer, accumulate_gradients
from gptfast.training import updates as steps
from gptfast.training.timing import RunClock

B, T = 2, 1024
BYTES = 28  # of AdamW for a weight: reads weight, gradient and two moments, writes weight and moments; float32


now = time.perf_counter


class Clocks:
    """Seconds of parts of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        spent = self.seconds.setdefault(name, [])

        def timed(*args: Any, **options: Any) -> Any:
            start = now()
            try:
                return function(*args, **options)
            finally:
                spent.append(now() - start)

        return timed


def make_trainer(out: Path, dtype: str) -> Trainer:
    model = gptfast.GPT(gptfast.GPTConfig.preset("gpt2", dropout=0.0))
    tokens = np.random.default_rng(0).integers(0, 50257, 2_000_000).astype(np.uint16)
    np.save(out / "tokens.npy", tokens)
    mapped = np.load(out / "tokens.npy", mmap_mode="r")
    config = TrainConfig(batch_size=B, max_steps=100_000, eval_every=100_000, log_every=1, dtype=dtype, device="cpu")
    trainer = Trainer(model, mapped, mapped[:5000], config, out / "run", tensorboard=True, progress=False)
    trainer.clock = RunClock()
    return trainer


def instrument(trainer: Trainer, clocks: Clocks) -> None:
    """Take the time of the parts of this trainer's steps."""
    objective: Any = trainer.objective
    objective.batches = clocks.around("loader", objective.batches)
    objective.add_gradients = clocks.around("forward and backward", objective.add_gradients)
    trainer.log.write = clocks.around("log", trainer.log.write)
    trainer._machine = clocks.around("figures of the machine", trainer._machine)
    trainer.progress.show = clocks.around("progress", trainer.progress.show)
    steps.gradient_norm = clocks.around("norm", steps.gradient_norm)
    steps.clipped_step = clocks.around("clipping and AdamW", steps.clipped_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        globals()["now"] = time.process_time
    gptfast.tune_malloc()
    machine, clocks = measure_machine(), Clocks()
    print(
        f"{machine.name}, {machine.threads} threads, {machine.isa}, torch {machine.torch}, copy {machine.copy_gbs:.0f} GB/s"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), options.dtype)
        batch = trainer.objective.batches(0, trainer.config)
        instrument(trainer, clocks)

        def gradients() -> None:
            accumulate_gradients(trainer.model, batch, trainer.autocast)
            trainer.model.zero_grad(set_to_none=True)

        least, whole = [], []
        for n in range(options.rounds + 1):
            if n == 1:
                for spent in clocks.seconds.values():
                    spent.clear()
            for values, step in ((least, gradients), (whole, trainer._step)):
                start = now()
                step()
                values.append(now() - start)
        trainer.log.close()
        trainer._release()
    report(machine.copy_gbs, trainer, clocks, least[1:], whole[1:])


def report(bandwidth: float, trainer: Trainer, clocks: Clocks, least: list[float], whole: list[float]) -> None:
    optimizer = BYTES * trainer.model.num_parameters() / (bandwidth * 1e9)
    ratio = statistics.median((a + optimizer) / b for a, b in zip(least, whole, strict=True))
    step = statistics.median(whole)
    print(f"GPT-2 124M, B={B} T={T}, {trainer.config.dtype}, medians of {len(whole)} rounds")
    print(f"  forward + backward alone          {1e3 * statistics.median(least):9.1f} ms")
    print(f"  AdamW at {bandwidth:.0f} GB/s                {1e3 * optimizer:9.1f} ms")
    print(f"  whole step of gptfast train       {1e3 * step:9.1f} ms, {B * T / step:,.0f} tokens/s")
    print(f"  the least over the whole          {ratio:9.3f} (wanted: 0.97)")
    rounds = len(whole)
    parts = {name: sum(spent) / rounds for name, spent in clocks.seconds.items()}
    for name, seconds in parts.items():
        print(f"    {name:<28}{1e3 * seconds:12.2f} ms {100 * seconds / step:7.2f} %")
    around = sum(parts[name] for name in ("loader", "log", "figures of the machine", "progress"))
    print(
        f"  loader and log together           {1e3 * around:9.2f} ms {100 * around / step:7.2f} % of a step (wanted: below 2)"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
