"""transformers' GPT-2 124M patched by `gptfast.accelerate`, beside `gptfast.GPT` and beside itself unpatched, in one run.

    python benchmarks/bench_drop_in.py [--rounds 5] [--cpu-time] [--only bfloat16:0.1] [--plain] [--generate]

Training: forward and backward of B=2, T=1024 in turns, ratios are medians over the rounds; peak memory is that of a process
which makes two steps. --plain: the unpatched model too, as installed (SDPA). --generate: batch 1, bfloat16, with and without
the patch: greedy, where the text of random weights repeats itself and drafts are right, and drawn, where they never are. --cpu-time counts the process's own CPU seconds, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_step
import torch

import gptfast

V = 50257
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_of(kind: str, dtype: str, dropout: float, layers: int) -> Any:
    """`kind`: own, patched or plain."""
    torch.manual_seed(0)
    if kind == "own":
        config = gptfast.GPTConfig.preset("gpt2", dropout=dropout, n_layer=layers)
        return gptfast.GPT(config).to(DTYPES[dtype]).train()
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, **rates)).to(DTYPES[dtype]).train()
    if kind == "patched":
        gptfast.accelerate(model)
    return model


def step_of(kind: str, model: Any, batch: int, length: int) -> Callable[[], None]:
    ids = torch.randint(V, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        loss = model(x, y)[1] if kind == "own" else model(input_ids=x, labels=x)["loss"]
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def peak_memory(kind: str, dtype: str, dropout: float, options: argparse.Namespace) -> float:
    """GB of a process that makes two steps, less what one has after its imports."""
    arguments = (kind, dtype, dropout, options.layers, options.batch, options.length)
    code = f"import bench_drop_in as b; b.print_peak(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(kind: str, dtype: str, dropout: float, layers: int, batch: int, length: int) -> None:
    from transformers import GPT2LMHeadModel  # noqa: F401  in every process alike: `import transformers` alone loads little

    gptfast.tune_malloc()
    before = bench_step.peak_gigabytes()
    step = step_of(kind, model_of(kind, dtype, dropout, layers), batch, length)
    step()
    step()
    print(bench_step.peak_gigabytes() - before)


def compare_steps(dtype: str, dropout: float, options: argparse.Namespace) -> None:
    kinds = ["own", "patched"] + ["plain"] * options.plain
    steps = {k: step_of(k, model_of(k, dtype, dropout, options.layers), options.batch, options.length) for k in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for n in range(options.rounds + 1):
        for kind, step in steps.items():
            start = options.clock()
            step()
            if n:
                times[kind].append(options.clock() - start)
    print(f"{dtype}, dropout {dropout}")
    del steps
    peaks = {kind: peak_memory(kind, dtype, dropout, options) for kind in kinds} if options.memory else {}
    for kind in kinds:
        seconds = statistics.median(times[kind])
        ratio = statistics.median(o / t for t, o in zip(times[kind], times["own"], strict=True))
        memory = f"{peaks[kind]:8.2f} GB{peaks[kind] / peaks['own']:7.2f}x" if peaks else ""
        print(f"  {kind:<10}{seconds:8.2f} s a step, speed {ratio:.3f} of our own{memory}", flush=True)


def compare_generate(options: argparse.Namespace) -> None:
    """New tokens a second after a prompt of 32, of whole calls; the first call of each is not counted."""
    ids = torch.randint(V, (1, 32), generator=torch.Generator().manual_seed(1))
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": None}
    models = {k: model_of(k, "bfloat16", 0.0, options.layers).eval() for k in ("patched", "plain")}
    rates: dict[tuple[str, bool], list[float]] = {(k, draws): [] for draws in (False, True) for k in models}
    for n in range(options.rounds + 1):
        for (kind, draws), values in rates.items():
            start = options.clock()
            models[kind].generate(ids, max_new_tokens=options.new, do_sample=draws, **given)
            if n:
                values.append(options.new / (options.clock() - start))
    for draws in (False, True):
        patched, plain = rates["patched", draws], rates["plain", draws]
        ratio = statistics.median(a / b for a, b in zip(patched, plain, strict=True))
        print(
            f"generate, bfloat16, batch 1, {options.new} new tokens, {'drawn' if draws else 'greedy'}: tokens/s patched "
            f"{statistics.median(patched):.1f}, plain {statistics.median(plain):.1f}; {ratio:.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="float32:0.0,float32:0.1,bfloat16:0.0,bfloat16:0.1", help="none: no training")
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    for name, value in {"layers": 12, "batch": 2, "length": 1024, "new": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    options.clock = options.clock or time.perf_counter
    gptfast.tune_malloc()
    for case in [] if options.only == "none" else options.only.split(","):
        dtype, dropout = case.split(":")
        compare_steps(dtype, float(dropout), options)
    if options.generate:
        compare_generate(options)


if __name__ == "__main__":
    main()
