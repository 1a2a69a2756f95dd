"""Training speed under bounds of OpenMP's spinning, quiet and beside busy loops.

    python benchmarks/bench_spin.py [--busy 0 1 2] [--rounds 3] [--seconds 6]

Tokens/s of the demo's model and step (`make demo`), each figure from a process of its own, as GOMP_SPINCOUNT is read when
torch is loaded. The bounds take turns in each round; the table has the medians, and the ratio to no bound in the same round.
Nothing else may run on the machine: the load is printed at the start.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from gptfast.benchmarking.busy import busy_loops

BOUNDS = (None, 300_000, 10_000, 1_000)
SHAPE = {"n_layer": 4, "n_head": 6, "n_embd": 192, "block_size": 128, "vocab_size": 90, "dropout": 0.0}
BATCH = 16


def tokens_per_second(bound: int | None, seconds: float) -> float:
    """Of a process with this bound, or without any."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if bound is not None:
        environment["GOMP_SPINCOUNT"] = str(bound)
    command = [sys.executable, __file__, "--worker", "--seconds", str(seconds)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def worker(seconds: float) -> float:
    """Train for so long after ten steps to warm up."""
    import torch

    from gptfast import GPT, GPTConfig, tune_malloc
    from gptfast.machine import bfloat16_instructions
    from gptfast.training import TrainConfig, accumulate_gradients
    from gptfast.training.optim import build_optimizers, parameters_of

    tune_malloc()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE)).train()
    optimizers = build_optimizers(model, TrainConfig(optimizer="muon"))
    x, y = torch.randint(SHAPE["vocab_size"], (2, BATCH, SHAPE["block_size"])).unbind()
    paired = bfloat16_instructions() is not None
    steps, start = -10, 0.0
    while steps < 1 or time.perf_counter() - start < seconds:
        accumulate_gradients(model, [(x, y)], lambda: torch.autocast("cpu", torch.bfloat16, enabled=paired))
        torch.nn.utils.clip_grad_norm_(parameters_of(optimizers), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps == 0:
            start = time.perf_counter()
    return steps * x.numel() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="busy loops beside")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of training in each process")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return print(worker(options.seconds))
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f} before the first run")
    print(f"{'busy loops':>10}" + "".join(f"{'no bound' if b is None else b:>20}" for b in BOUNDS), flush=True)
    for busy in options.busy:
        speeds: dict[int | None, list[float]] = {bound: [] for bound in BOUNDS}
        with busy_loops(busy):
            for n in range(options.rounds):
                for bound in BOUNDS[n % len(BOUNDS) :] + BOUNDS[: n % len(BOUNDS)]:
                    speeds[bound].append(tokens_per_second(bound, options.seconds))
        cells = []
        for values in speeds.values():
            ratio = statistics.median(v / free for v, free in zip(values, speeds[None], strict=True))
            cells.append(f"{statistics.median(values):>12,.0f} {ratio:>6.2f}x")
        print(f"{busy:>10}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
