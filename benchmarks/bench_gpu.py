"""`make bench-gpu`: the CUDA and the Triton kernels beside PyTorch's own on the GPU at hand; a table, and benchmarks/results/<gpu>.json.

Every comparison is made in turns within one run; a figure is the median over the rounds. Kernels that move memory are
given in GB/s of the least bytes that the op must move, and in percent of a copy measured in the same run. A comparison
that is lost is printed like one that is won. Nothing here means anything on an emulator or a CPU.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import GPT, GPTConfig, backend, ops
from gptfast.backend import ops_of

RESULTS = Path(__file__).parent / "results"
ROUNDS, WARMUP = 15, 5
Run = Callable[[], Any]


def milliseconds(runs: dict[str, Run], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each, all taking turns."""
    for run in runs.values():
        for _ in range(WARMUP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")  # larger than any L2
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def with_gradients(f: Callable[..., Tensor], *leaves: Tensor) -> Run:
    """Forward and backward of f against a fixed upstream gradient."""
    leaves = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in leaves)
    wanted = [t for t in leaves if t.requires_grad]
    upstream = torch.randn_like(f(*leaves))
    return lambda: torch.autograd.grad(f(*leaves), wanted, upstream)


def on_triton(run: Run) -> Run:
    def triton() -> Any:
        with backend("triton"):
            return run()

    return triton


def copy_bandwidth() -> float:
    x = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / milliseconds({"copy": lambda: y.copy_(x)})["copy"] / 1e6


def memory_cases() -> dict[str, tuple[float, dict[str, Run]]]:
    """Name -> (least bytes, what takes turns)."""
    N, C, V = 16384, 1024, 50257
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, residual, w, b = (
        torch.randn(N, C, **make),
        torch.randn(N, C, **make),
        torch.ones(C, **make),
        torch.zeros(C, **make),
    )
    logits, targets = torch.randn(4096, V, **make), torch.randint(V, (4096,), device="cuda")
    rows = torch.randn(64, V, **make)
    wide, wide_bias = torch.randn(N, 4 * C, **make), torch.zeros(4 * C, **make)
    tensor, matrix, whole = 2 * N * C, 2 * 4096 * V, 2 * N * 4 * C

    def drop_add_norm(x: Tensor, r: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(x, 0.1) + r, (C,), w, b)

    def sorted_top_p() -> Tensor:
        probs, ids = torch.softmax(rows.float() / 0.8, -1).sort(-1, descending=True)
        keep = probs.cumsum(-1) - probs < 0.9
        return ids.gather(-1, torch.multinomial(probs * keep, 1))

    return {
        "layer_norm": (
            2 * tensor,
            {"gptfast": lambda: ops.layer_norm(x, w, b), "torch": lambda: F.layer_norm(x, (C,), w, b)},
        ),
        "layer_norm fwd+bwd": (
            5 * tensor,
            {
                "gptfast": with_gradients(ops.layer_norm, x, w, b),
                "torch": with_gradients(lambda x, w, b: F.layer_norm(x, (C,), w, b), x, w, b),
            },
        ),
        "add_layer_norm, dropout": (
            4 * tensor,
            {
                "gptfast": lambda: ops.add_layer_norm(x, residual, w, b, dropout_p=0.1),
                "torch": lambda: drop_add_norm(x, residual),
            },
        ),
        "gelu with bias": (
            2 * whole,
            {
                "gptfast": lambda: ops.gelu(wide, wide_bias),
                "torch": lambda: F.gelu(wide + wide_bias, approximate="tanh"),
            },
        ),
        "gelu with bias fwd+bwd": (
            5 * whole,
            {
                "gptfast": with_gradients(ops.gelu, wide, wide_bias),
                "torch": with_gradients(lambda x, b: F.gelu(x + b, approximate="tanh"), wide, wide_bias),
            },
        ),
        "dropout": (2 * tensor, {"gptfast": lambda: ops.dropout(x, 0.1), "torch": lambda: F.dropout(x, 0.1)}),
        "cross_entropy": (
            matrix,
            {"gptfast": lambda: ops.cross_entropy(logits, targets), "torch": lambda: F.cross_entropy(logits, targets)},
        ),
        "cross_entropy fwd+bwd": (
            3 * matrix,
            {
                "gptfast": with_gradients(lambda x: ops.cross_entropy(x, targets), logits),
                "torch": with_gradients(lambda x: F.cross_entropy(x.float(), targets), logits),
            },
        ),
        "sample 64 x 50257, top_p": (
            2 * rows.numel(),
            {"gptfast": lambda: ops.sample(rows, temperature=0.8, top_p=0.9), "torch": sorted_top_p},
        ),
    }


def attention(D: int, T: int, dropout: float) -> dict[str, Run]:
    """Forward and backward of causal attention over 16k tokens and 2048 channels, by everything that can run it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(16384 // T, 2048 // D, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    runs: dict[str, Run] = {}

    def add(name: str, f: Callable[..., Tensor]) -> None:
        try:
            runs[f"{name} fwd"] = lambda: f(q, k, v)
            runs[f"{name} fwd"]()
            runs[f"{name} fwd+bwd"] = with_gradients(f, q, k, v)
        except RuntimeError:  # this backend does not take the shape
            runs.pop(f"{name} fwd", None)

    if "causal_attention" in ops_of("cuda"):
        add("gptfast", lambda q, k, v: ops.causal_attention(q, k, v, dropout_p=dropout, backend="cuda"))
    add("triton", lambda q, k, v: ops.causal_attention(q, k, v, dropout_p=dropout, backend="triton"))
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):

        def sdpa(q: Tensor, k: Tensor, v: Tensor, name: str = name) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, name)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)

        add(name.split("_")[0].lower(), sdpa)
    return runs


def training_steps() -> dict[str, Run]:
    """One step of GPT-2 124M on 16 rows of 1024 tokens in bf16: forward, backward, AdamW."""
    ids = torch.randint(50257, (16, 1025), device="cuda")
    steps: dict[str, Run] = {}
    for name, choice in (("gptfast", "auto"), ("triton", "triton"), ("eager", "eager")):
        model = GPT(GPTConfig.preset("gpt2", dropout=0.0)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model: GPT = model, optimizer: torch.optim.Optimizer = optimizer, choice: str = choice) -> None:
            with backend(choice), torch.autocast("cuda", torch.bfloat16):
                _, loss = model(ids[:, :-1], ids[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps[name] = step
    return steps


def main() -> int:
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no NVIDIA GPU, so there is nothing to measure; no figure was written")
        return 2
    gpu = torch.cuda.get_device_name()
    copy = copy_bandwidth()
    results: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__, "copy GB/s": copy, "memory": {}, "attention": {}}
    print(f"{gpu}, torch {torch.__version__}; copy {copy:,.0f} GB/s\n")
    for name, (least, runs) in memory_cases().items():
        times = milliseconds({**runs, "triton": on_triton(runs["gptfast"])})
        results["memory"][name] = {"ms": times, "GB/s": least / times["gptfast"] / 1e6}
        speed = least / times["gptfast"] / 1e6
        print(
            f"{name:28} {speed:7,.0f} GB/s {100 * speed / copy:4.0f}% of copy   torch/gptfast {times['torch'] / times['gptfast']:.2f}x, "
            f"torch/triton {times['torch'] / times['triton']:.2f}x"
        )
    for D in (64, 80, 128):
        for T in (512, 1024, 2048, 4096, 8192, 16384):
            for dropout in (0.0, 0.1):
                times = milliseconds(attention(D, T, dropout), rounds=7)
                flops = 4 * 16384 * T / 2 * 2048  # causal: half the scores
                rates = {n: flops * (3.5 if "bwd" in n else 1) / ms / 1e9 for n, ms in times.items()}
                results["attention"][f"D{D} T{T} dropout {dropout}"] = rates
                print(
                    f"attention D={D} T={T} p={dropout}: "
                    + ", ".join(f"{n} {r:.0f}" for n, r in rates.items())
                    + " TFLOP/s"
                )
    times = milliseconds(training_steps())
    results["GPT-2 124M tokens/s"] = {name: 16 * 1024 / ms * 1e3 for name, ms in times.items()}
    print("GPT-2 124M: " + ", ".join(f"{n} {r:,.0f} tokens/s" for n, r in results["GPT-2 124M tokens/s"].items()))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (re.sub(r"\W+", "-", gpu.lower()).strip("-") + ".json")
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
