"""Cached generation with GPT-2 124M in bfloat16: tokens/s in captured steps, with blocks of five kernels that overlap, that do
not, and module by module, in steps that wait for every token, and by transformers with a static cache, whose step it compiles on
a GPU. Before that the layers of a block at one row and at eight, each a kernel of ours beside torch's norm, product and activation."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptfast
from gptfast import generation
from gptfast.generation import Runner, TorchRunner
from gptfast.generation.cuda_graphs import CudaGraphRunner
from gptfast.ops import RowNorm, linear_few

from .memory_bound import Cases, report
from .timing import Bench, Row, Run, that_run

OPTIONS: dict[str, Any] = {"top_k": 50, "seed": 3}
BESIDE = "decode beside transformers"
ONE_BY_ONE = "one by one"  # kernels that start when the one before has ended


def configuration(bench: Bench) -> gptfast.GPTConfig:
    if bench.tiny:
        return gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=24, vocab_size=61, dropout=0.0)
    return gptfast.GPTConfig.preset("gpt2", dropout=0.0)


def runs(bench: Bench, model: gptfast.GPT, rows: int, prompt: int, new: int) -> dict[str, Run]:
    prompts = torch.randint(model.config.vocab_size, (rows, prompt)).tolist()
    runners: dict[str, Runner] = {"gptfast": CudaGraphRunner(model, 1, 1), "without graphs": TorchRunner(model, 1, 1)}
    runners["by modules"] = CudaGraphRunner(by_modules(model), 1, 1)
    runners[ONE_BY_ONE] = CudaGraphRunner(model, 1, 1)

    def run(name: str) -> None:
        """As `model.generate` on a GPU, or in uncaptured steps; on the emulator all steps are uncaptured."""
        os.environ["GPTFAST_CUDA_OVERLAP"] = "0" if name == ONE_BY_ONE else "1"  # as the step is captured
        with gptfast.backend(bench.backend):
            generation.generate(runners[name], prompts, max_new_tokens=new, **OPTIONS)

    return {name: partial(run, name) for name in runners}


def by_modules(model: gptfast.GPT) -> gptfast.GPT:
    """A copy whose blocks are not five kernels each: anything hooked to them runs module by module."""
    copied = copy.deepcopy(model)
    for block in copied.h:
        block.ln_2.register_forward_hook(lambda *_: None)
    return copied


def layers(bench: Bench) -> Cases:
    """The least bytes of a layer are its weight's."""
    C = bench.size(768, 64)
    shapes = {"c_attn": (C, 3 * C), "attn.c_proj": (C, C), "c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    return {
        f"{name}, {rows} rows": (2 * K * N, candidates(bench, rows, K, N, name))
        for rows in bench.sizes((1, 8), (2,))
        for name, (K, N) in shapes.items()
    }


def candidates(bench: Bench, rows: int, K: int, N: int, name: str) -> dict[str, Any]:
    x, weight, bias, residual = bench.randn(rows, K), bench.randn(N, K), bench.randn(N), bench.randn(rows, N)
    scale, shift = bench.randn(K), bench.randn(K)
    norm = RowNorm("layer_norm", scale, shift, 1e-5) if name in ("c_attn", "c_fc") else None
    activation = "gelu_tanh" if name == "c_fc" else None
    added = None if norm else residual

    def ours() -> Tensor:
        return linear_few(bench.backend, x, weight, bias, norm=norm, activation=activation, residual=added)

    def theirs(x: Tensor) -> Tensor:
        x = F.layer_norm(x, (K,), scale, shift) if norm else x
        y = F.linear(x, weight, bias)
        y = F.gelu(y, approximate="tanh") if activation else y
        return y if added is None else y + added

    compiled = torch.compile(theirs) if bench.real else theirs
    return {"gptfast": lambda: ours, "torch": lambda: partial(theirs, x), "compile": lambda: partial(compiled, x)}


def plan(bench: Bench) -> list[str]:
    beside = [BESIDE] if importlib.util.find_spec("transformers") else []
    return [*layers(bench), *(f"decode, {rows} rows" for rows in counts(bench)), *beside]


def counts(bench: Bench) -> tuple[int, ...]:
    return bench.sizes((1, 8, 64), (2,))


def measure(bench: Bench) -> Iterator[Row]:
    yield from report(bench, layers(bench))
    model = gptfast.GPT(configuration(bench)).to(bench.device, torch.bfloat16).eval()
    prompt, new = bench.size(64, 3), bench.size(256, 4)
    head = f"\n{f'decode, prompts of {prompt}, {new} new':32}{'tokens/s':>12}"
    print(head + f"{'without graphs':>16}{'by modules':>12}{ONE_BY_ONE:>12}{'gptfast is':>12}")
    for rows in counts(bench):
        found = runs(bench, model, rows, prompt, new)
        able, refused = that_run((name, lambda run=run: run) for name, run in found.items())
        times = bench.milliseconds(able, rounds=5, warmup=1)
        speeds = {name: rows * new / ms * 1e3 for name, ms in times.items()}
        shown = {name: f"{speeds[name]:,.0f}" if name in speeds else "-" for name in found}
        both = len(speeds) == len(found)
        ratio = f"{times['without graphs'] / times['gptfast']:.2f}x" if both else "-"
        cells = f"{shown['gptfast']:>12}{shown['without graphs']:>16}{shown['by modules']:>12}{shown[ONE_BY_ONE]:>12}{ratio:>12}"
        print(f"{f'{rows} rows':32}{cells}", flush=True)
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
