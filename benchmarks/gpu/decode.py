"""Cached generation with GPT-2 124M in bfloat16: tokens/s in captured steps, in steps that wait for every token, and by
transformers with a static cache, whose step it compiles on a GPU."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import gptfast
from gptfast import generation
from gptfast.generation import Runner, TorchRunner
from gptfast.generation.cuda_graphs import CudaGraphRunner

from .timing import Bench, Row, Run, that_run

OPTIONS: dict[str, Any] = {"top_k": 50, "seed": 3}
BESIDE = "decode beside transformers"


def configuration(bench: Bench) -> gptfast.GPTConfig:
    if bench.tiny:
        return gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=24, vocab_size=61, dropout=0.0)
    return gptfast.GPTConfig.preset("gpt2", dropout=0.0)


def runs(bench: Bench, model: gptfast.GPT, rows: int, prompt: int, new: int) -> dict[str, Run]:
    prompts = torch.randint(model.config.vocab_size, (rows, prompt)).tolist()
    runners = {"gptfast": CudaGraphRunner(model, 1, 1), "without graphs": TorchRunner(model, 1, 1)}

    def run(runner: Runner) -> None:
        """As `model.generate` on a GPU, or in uncaptured steps; on the emulator all steps are uncaptured."""
        with gptfast.backend(bench.backend):
            generation.generate(runner, prompts, max_new_tokens=new, **OPTIONS)

    return {name: partial(run, runner) for name, runner in runners.items()}


def plan(bench: Bench) -> list[str]:
    beside = [BESIDE] if importlib.util.find_spec("transformers") else []
    return [*(f"decode, {rows} rows" for rows in counts(bench)), *beside]


def counts(bench: Bench) -> tuple[int, ...]:
    return bench.sizes((1, 8, 64), (2,))


def measure(bench: Bench) -> Iterator[Row]:
    model = gptfast.GPT(configuration(bench)).to(bench.device, torch.bfloat16).eval()
    prompt, new = bench.size(64, 3), bench.size(256, 4)
    print(f"\n{f'decode, prompts of {prompt}, {new} new':32}{'tokens/s':>12}{'without graphs':>16}{'gptfast is':>12}")
    for rows in counts(bench):
        candidates = runs(bench, model, rows, prompt, new)
        able, refused = that_run((name, lambda run=run: run) for name, run in candidates.items())
        times = bench.milliseconds(able, rounds=5, warmup=1)
        speeds = {name: rows * new / ms * 1e3 for name, ms in times.items()}
        shown = {name: f"{speeds[name]:,.0f}" if name in speeds else "-" for name in candidates}
        both = len(speeds) == len(candidates)
        ratio = f"{times['without graphs'] / times['gptfast']:.2f}x" if both else "-"
        print(f"{f'{rows} rows':32}{shown['gptfast']:>12}{shown['without graphs']:>16}{ratio:>12}", flush=True)
        for name, reason in refused.items():
            print(f"{name:32}did not run: {reason}")
        yield {"what": f"decode, {rows} rows", "ms": times, "tokens/s": speeds, "refused": refused, **bench.spread}
    if BESIDE in plan(bench):  # last: what compiles may be cut off
        yield beside_transformers(bench, model, counts(bench)[0], prompt, new)


def beside_transformers(bench: Bench, model: gptfast.GPT, rows: int, prompt: int, new: int) -> Row:
    """The same weights in transformers' model, in its fastest way of generation."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16).to(bench.device).eval()
    ids = torch.randint(model.config.vocab_size, (rows, prompt), device=bench.device)
    how: dict[str, Any] = {"do_sample": True, "top_k": OPTIONS["top_k"], "cache_implementation": "static"}
    how |= {"max_new_tokens": new, "min_new_tokens": new, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    makers = {
        "gptfast": lambda: runs(bench, model, rows, prompt, new)["gptfast"],
        "transformers": lambda: lambda: theirs.generate(ids, **how),
    }
    able, refused = that_run(makers.items())
    times = bench.milliseconds(able, rounds=5, warmup=1)
    speeds = {name: rows * new / ms * 1e3 for name, ms in times.items()}
    cells = ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items())
    print(f"{f'{rows} rows, static cache':32}{cells}", flush=True)
    return {"what": BESIDE, "ms": times, "tokens/s": speeds, "refused": refused, **bench.spread}
