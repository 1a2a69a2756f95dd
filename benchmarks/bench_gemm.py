"""What the fixed rule of `gptfast.ops.gemm` costs beside the fastest way of each product.

    python benchmarks/bench_gemm.py [--rows 1024 2048 4096] [--rounds 7] [--steps]

The products of GPT-2 124M and of the demo's model, in turns; percent of the limit, medians. "rule" is the way that the rule
takes, and its ratio that of the fastest way's time to it: below 1 something is lost. With --steps whole training steps too
(GPT-2 124M with B=2, T=1024; the demo's model with B=16, T=128), by the rule, by each way alone, and by the way that was
fastest for each layout in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

import gptfast
from gptfast.benchmarking import measure_machine
from gptfast.ops import gemm as g
from gptfast.training import TrainConfig
from gptfast.training.optim import build_optimizers, parameters_of

GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]  # out, in
DEMO = [(576, 192), (192, 192), (768, 192), (192, 768)]
HEAD = (50257, 768)
Times = dict[str, list[float]]


def in_turns(runners: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Milliseconds of each, round after round, beginning with another one each time; one round to warm up."""
    times: Times = {name: [] for name in runners}
    names = list(runners)
    for n in range(rounds + 1):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            start = time.perf_counter()
            runners[name]()
            if n:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def products(rows: int, out: int, width: int, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, ...]]:
    """(a, b, result) of y = x W^T, dx = dy W, dW = dy^T x: layouts nt, nn, tn; weights and their gradient are fp32."""
    x, dy = torch.randn(rows, width).to(dtype), torch.randn(rows, out).to(dtype)
    weight = torch.randn(out, width)
    return {
        "nt": (x, weight.t(), torch.empty(rows, out, dtype=dtype)),
        "nn": (dy, weight, torch.empty(rows, width, dtype=dtype)),
        "tn": (dy.t(), x, torch.empty(out, width)),
    }


def bench_products(options: argparse.Namespace, machine) -> dict[str, str]:
    """Prints a line a product; returns the fastest way of each layout and dtype, by the sum of the times."""
    totals: dict[str, dict[str, float]] = {}
    print(f"{'product':<34}" + "".join(f"{name:>9}" for name in g.IMPLEMENTATIONS) + f"{'rule':>9}{'ratio':>8}")
    shapes = [(rows, *s) for rows in options.rows for s in GPT2 + DEMO] + [(384, *HEAD)]
    for dtype in (torch.float32, torch.bfloat16):
        rule, kind = g.default_for(dtype), str(dtype)[6:]
        for rows, out, width in shapes:
            for layout, (a, b, result) in products(rows, out, width, dtype).items():
                runners = {name: partial(by, name, dtype, a, b, result) for name in g.IMPLEMENTATIONS}
                times = in_turns(runners, options.rounds)
                key = f"{layout} {kind}"
                sums = totals.setdefault(key, dict.fromkeys(g.IMPLEMENTATIONS, 0.0))
                for name in g.IMPLEMENTATIONS:
                    sums[name] += statistics.median(times[name])
                share = {
                    n: 2 * rows * out * width / (statistics.median(t) * 1e-3) / machine.peak(dtype) * 100
                    for n, t in times.items()
                }
                ratio = statistics.median(
                    min(t) / t[g.IMPLEMENTATIONS.index(rule)] for t in zip(*times.values(), strict=True)
                )
                print(
                    f"{key:<12}{rows:>5} {out:>6} x {width:<6}  "
                    + "".join(f"{share[n]:>9.0f}" for n in g.IMPLEMENTATIONS)
                    + f"{rule:>9}{ratio:>8.2f}",
                    flush=True,
                )
    return {key: min(sums, key=sums.__getitem__) for key, sums in totals.items()}


def by(name: str, dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    ways = {f"{a}{b} {str(dtype)[6:]}": name for a in "nt" for b in "nt"}
    with g.use_implementations(ways):
        g.gemm(a, b, out, dtype=dtype)


def stepper(config: gptfast.GPTConfig, batch: int, bf16: bool, optimizer: str) -> Callable[[], object]:
    torch.manual_seed(0)
    model = gptfast.GPT(config).train()
    optimizers = build_optimizers(model, TrainConfig(optimizer=optimizer))
    x, y = torch.randint(config.vocab_size, (2, batch, config.block_size)).unbind()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters_of(optimizers), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)

    return step


def bench_steps(options: argparse.Namespace, fastest: dict[str, str]) -> None:
    demo = gptfast.GPTConfig(n_layer=4, n_head=6, n_embd=192, block_size=128, vocab_size=90, dropout=0.0)
    print(f"\nfastest by layout: {fastest}")
    print(
        f"{'training step, ms':<34}" + "".join(f"{n:>10}" for n in ("rule", *g.IMPLEMENTATIONS, "fastest", "rule is"))
    )
    for name, config, batch, optimizer, repeat in (
        ("demo, B=16", demo, 16, "muon", 20),
        ("GPT-2 124M, B=2", gptfast.GPTConfig.preset("gpt2", dropout=0.0), 2, "adamw", 1),
    ):
        for bf16 in (False, True):
            step, dtype = stepper(config, batch, bf16, optimizer), "bfloat16" if bf16 else "float32"
            ways = {"rule": {}, **{n: {f"{a}{b} {dtype}": n for a in "nt" for b in "nt"} for n in g.IMPLEMENTATIONS}}
            ways["fastest"] = fastest

            def run(way: dict[str, str], step=step, repeat=repeat) -> None:
                with g.use_implementations(way):
                    for _ in range(repeat):
                        step()

            times = in_turns({n: lambda w=way: run(w) for n, way in ways.items()}, options.rounds)
            ratio = statistics.median(f / r for f, r in zip(times["fastest"], times["rule"], strict=True))
            cells = "".join(f"{statistics.median(t) / repeat:>10.1f}" for t in times.values())
            print(f"{name + ' ' + dtype:<34}{cells}{ratio:>9.3f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", action="store_true", help="whole training steps too (minutes)")
    options = parser.parse_args()
    if g.is_forced():
        parser.error("GPTFAST_GEMM is set, and every product would take the same way; unset it")
    gptfast.tune_malloc()
    machine = measure_machine()
    print(f"{machine.name}, {machine.threads} threads, {machine.isa}, torch {machine.torch}, malloc tuned")
    print(f"limits fp32 {machine.fp32_gflops:.0f}, bf16 {machine.bf16_gflops:.0f} GFLOP/s; percent of them:")
    fastest = bench_products(options, machine)
    if options.steps:
        bench_steps(options, fastest)


if __name__ == "__main__":
    main()
