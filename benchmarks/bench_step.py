"""The training step of GPT-2 124M (B=2, T=1024, forward + backward) beside transformers, in one run.

    python benchmarks/bench_step.py [--compile] [--rounds 3]

Ours and the peers take turns; ratios are medians over the rounds. Malloc is tuned for all (`gptfast.tune_malloc`). The
limit is peak FLOP/s measured at the start over 6 flops a parameter and token plus attention. Peak memory is that of a
process which makes two steps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gptfast
from gptfast.benchmarking import measure_machine

B, T = 2, 1024
FLOPS_PER_TOKEN = 6 * (124_439_808 - 1024 * 768) + 12 * 2 * T * 768 * 3.5  # weights; attention, half of it masked
Step = Callable[[], float]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(50257, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(dropout: float, bf16: bool) -> Step:
    model = gptfast.GPT(gptfast.GPTConfig.preset("gpt2", dropout=dropout)).train()
    return stepper(model, lambda x, y: model(x, y)[1], bf16)


def transformers_step(dropout: float, bf16: bool, compiled: bool = False) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa", **rates)).train()
    run = torch.compile(model) if compiled else model
    return stepper(model, lambda x, y: run(input_ids=x, labels=x).loss, bf16)


def stepper(model: torch.nn.Module, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], bf16: bool) -> Step:
    x, y = batch()

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(x, y)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


MAKERS: dict[str, Callable[[float, bool], Step]] = {
    "gptfast": ours,
    "transformers, SDPA": transformers_step,
    "transformers, torch.compile": lambda dropout, bf16: transformers_step(dropout, bf16, compiled=True),
}


def peak_memory(name: str, dropout: float, bf16: bool) -> float:
    """GB of a process that makes two steps, less what one has after its imports."""
    code = f"import bench_step as b; b.print_peak({name!r}, {dropout}, {bf16})"
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(name: str, dropout: float, bf16: bool) -> None:
    import transformers  # noqa: F401  in every process alike

    before = peak_gigabytes()
    step = MAKERS[name](dropout, bf16)
    step(), step()
    print(peak_gigabytes() - before)


def peak_gigabytes() -> float:
    """Of this program: ru_maxrss would begin with what the process that started it had."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also transformers under torch.compile (minutes more)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    gptfast.tune_malloc()
    machine = measure_machine()
    print(f"{machine.name}, {machine.threads} threads, {machine.isa}, torch {machine.torch}, malloc tuned")
    print(f"limits fp32 {machine.fp32_gflops:.0f}, bf16 {machine.bf16_gflops:.0f} GFLOP/s")
    print(f"{'GPT-2 124M, B=2 T=1024':<28}{'tokens/s':>10}{'% of limit':>12}{'ours is':>10}{'peak GB':>10}")
    for bf16, dropout in ((False, 0.0), (False, 0.1), (True, 0.0), (True, 0.1)):
        names = [n for n in MAKERS if options.compile or "compile" not in n]
        steps = {name: MAKERS[name](dropout, bf16) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for n in range(options.rounds + 1):
            for name, step in steps.items():
                seconds = step()
                if n:
                    times[name].append(seconds)
        print(f"{'bfloat16 autocast' if bf16 else 'float32'}, dropout {dropout}")
        limit = machine.peak(torch.bfloat16 if bf16 else torch.float32) / FLOPS_PER_TOKEN
        for name in names:
            speed = B * T / statistics.median(times[name])
            ratio = statistics.median(t / o for t, o in zip(times[name], times["gptfast"], strict=True))
            memory = f"{peak_memory(name, dropout, bf16):.2f}" if "compile" not in name else ""
            beside = "" if name == "gptfast" else f"{ratio:.2f}x"
            share = f"{100 * speed / limit:.0f}" if speed <= limit else "?"  # measured while the machine was busy
            print(f"  {name:<26}{speed:>10.0f}{share:>12}{beside:>10}{memory:>10}", flush=True)


if __name__ == "__main__":
    main()
