"""The ops that move memory, in GB/s of the least bytes that each must move and in percent of a copy in the same run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import ops

from .timing import Bench, Run, that_run, with_gradients

Makers = dict[str, Callable[[], Run]]


def copy_speed(bench: Bench) -> float:
    """GB/s of a copy, read and written bytes together."""
    x = torch.empty(bench.size(1 << 28, 1 << 12), dtype=torch.float32, device=bench.device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / bench.milliseconds({"copy": lambda: y.copy_(x)})["copy"] / 1e6


def backends(bench: Bench, run: Callable[[str], Run]) -> Makers:
    """Our own kernels: those of the backend and those in Triton."""
    return {"gptfast": lambda: run(bench.backend), "triton": lambda: run("triton")}


def liger(make: Callable[[Any], Run]) -> Makers:
    """Liger's functions, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}

    def maker() -> Run:
        from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports] (optional)

        return make(functional)

    return {"liger": maker}


def cases(bench: Bench) -> dict[str, tuple[float, Makers]]:
    """Name -> (least bytes, who takes turns)."""
    return {**norms(bench), **activations(bench), **losses(bench), **sampling(bench), **packed_weights(bench)}


def norms(bench: Bench) -> dict[str, tuple[float, Makers]]:
    N, C = bench.size(16384, 16), bench.size(1024, 64)
    x, residual, w, b = bench.randn(N, C), bench.randn(N, C), bench.randn(C), bench.randn(C)
    tensor = x.numel() * x.element_size()

    def norm(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, w, b: ops.layer_norm(x, w, b, backend=name)

    def torch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), w, b)

    def add_norm(name: str) -> Run:
        return lambda: ops.add_layer_norm(x, residual, w, b, dropout_p=0.1, backend=name)

    return {
        "layer_norm": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: norm(name)(x, w, b)),
                "torch": lambda: lambda: torch_norm(x, w, b),
                **liger(lambda its: lambda: its.liger_layer_norm(x, w, b, 1e-5)),
            },
        ),
        "layer_norm fwd+bwd": (
            5 * tensor,
            {
                **backends(bench, lambda name: with_gradients(norm(name), x, w, b)),
                "torch": lambda: with_gradients(torch_norm, x, w, b),
                **liger(lambda its: with_gradients(lambda x, w, b: its.liger_layer_norm(x, w, b, 1e-5), x, w, b)),
            },
        ),
        "add_layer_norm, dropout": (
            4 * tensor,
            {
                **backends(bench, add_norm),
                "torch": lambda: lambda: torch_norm(F.dropout(x, 0.1) + residual, w, b),
            },
        ),
    }


def activations(bench: Bench) -> dict[str, tuple[float, Makers]]:
    N, C = bench.size(16384, 16), bench.size(4096, 64)
    x, bias = bench.randn(N, C), bench.randn(C)
    tensor = x.numel() * x.element_size()

    def gelu(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, bias: ops.gelu(x, bias, backend=name)

    def torch_gelu(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    return {
        "gelu with bias": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: gelu(name)(x, bias)),
                "torch": lambda: lambda: torch_gelu(x, bias),
            },
        ),
        "gelu with bias fwd+bwd": (
            5 * tensor,
            {
                **backends(bench, lambda name: with_gradients(gelu(name), x, bias)),
                "torch": lambda: with_gradients(torch_gelu, x, bias),
            },
        ),
        "dropout": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: ops.dropout(x, 0.1, backend=name)),
                "torch": lambda: lambda: F.dropout(x, 0.1),
            },
        ),
    }


def losses(bench: Bench) -> dict[str, tuple[float, Makers]]:
    N, V = bench.size(4096, 8), bench.size(50257, 257)
    logits, targets = bench.randn(N, V), torch.randint(V, (N,), device=bench.device)
    matrix = logits.numel() * logits.element_size()

    def loss(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.cross_entropy(x, targets, backend=name)

    return {
        "cross_entropy": (
            matrix,
            {
                **backends(bench, lambda name: lambda: loss(name)(logits)),
                "torch": lambda: lambda: F.cross_entropy(logits, targets),
            },
        ),
        "cross_entropy fwd+bwd": (
            3 * matrix,
            {
                **backends(bench, lambda name: with_gradients(loss(name), logits)),
                "torch": lambda: with_gradients(lambda x: F.cross_entropy(x, targets), logits),
                # Liger writes the gradient over the logits: its own
                **liger(lambda its: with_gradients(lambda x: its.liger_cross_entropy(x, targets), logits.clone())),
            },
        ),
    }


def sampling(bench: Bench) -> dict[str, tuple[float, Makers]]:
    logits = bench.randn(bench.size(64, 2), bench.size(50257, 257))

    def by_sorting(top_k: int, top_p: float) -> Tensor:
        """Temperature, cuts and draw as most PyTorch code does them."""
        probs, ids = torch.softmax(logits.float() / 0.8, -1).sort(-1, descending=True)
        if top_k:
            probs[:, top_k:] = 0
        if top_p < 1:
            probs = probs * (probs.cumsum(-1) - probs < top_p)
        return ids.gather(-1, torch.multinomial(probs, 1))

    def makers(**cut: Any) -> Makers:
        def draw(name: str) -> Run:
            return lambda: ops.sample(logits, temperature=0.8, backend=name, **cut)

        def sort() -> Tensor:
            return by_sorting(cut.get("top_k", 0), cut.get("top_p", 1.0))

        return {**backends(bench, draw), "torch": lambda: sort}

    least = logits.numel() * logits.element_size()
    rows, V = logits.shape
    cuts = {"": {}, ", top_k 50": {"top_k": 50}, ", top_p 0.9": {"top_p": 0.9}}
    return {f"sample {rows} x {V}{name}": (least, makers(**cut)) for name, cut in cuts.items()}


def packed_weights(bench: Bench) -> dict[str, tuple[float, Makers]]:
    """One row through a frozen layer: what counts is the read of its weight. PyTorch's has it in bf16."""
    K, N = bench.size(4096, 64), bench.size(16384, 64)
    x, weight = bench.randn(1, K), bench.randn(N, K)
    cases: dict[str, tuple[float, Makers]] = {}
    for format in ("int8", "int4"):
        packed = ops.quantize_groups(weight, format)

        def decode(packed: tuple[Tensor, Tensor] = packed, format: str = format) -> Any:
            return ops.quantized_linear(x, *packed, format=format)

        makers: Makers = {"gptfast": lambda run=decode: run, "torch": lambda: lambda: F.linear(x, weight)}
        cases[f"quantized_linear {format}, 1 row"] = (sum(t.numel() * t.element_size() for t in packed), makers)
    return cases


def measure(bench: Bench) -> list[dict[str, Any]]:
    copy = copy_speed(bench)
    print(f"copy {copy:,.0f} GB/s; all in bfloat16\n")
    print(f"{'':32}{'GB/s':>8}{'% of copy':>12}{'torch / gptfast':>18}{'triton / gptfast':>18}{'liger / gptfast':>18}")
    rows: list[dict[str, Any]] = [{"what": "copy", "GB/s": copy}]
    for name, (least, makers) in cases(bench).items():
        runs, refused = that_run(makers.items())
        times = bench.milliseconds(runs)
        row = {"what": name, "ms": times, "GB/s": {n: least / t / 1e6 for n, t in times.items()}, "refused": refused}
        rows.append(row)
        own = times.get("gptfast")
        if own is None:
            print(f"{name:32}{refused['gptfast']}")
            continue
        ratios = [f"{times[n] / own:.2f}x" if n in times else "-" for n in ("torch", "triton", "liger")]
        speed = least / own / 1e6
        print(f"{name:32}{speed:>8,.0f}{100 * speed / copy:>12.0f}" + "".join(f"{r:>18}" for r in ratios), flush=True)
    return rows
