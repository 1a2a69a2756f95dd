"""The ops that move memory, in GB/s of the least bytes that each must move and in percent of a copy in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from gptfast import ops

from .peers import PEERS, Cases, backends, liger, theirs
from .timing import Bench, Row, that_run, with_gradients
from .vocabulary import losses, sampling, tables


def cases(bench: Bench) -> Cases:
    narrow, wide = norms(bench, bench.size(768, 48)), norms(bench, bench.size(1024, 64))
    return {**narrow, **wide, **activations(bench), **losses(bench), **sampling(bench), **tables(bench)}


def norms(bench: Bench, C: int) -> Cases:
    N = bench.size(16384, 16)
    x, residual, w, b = bench.randn(N, C), bench.randn(N, C), bench.randn(C), bench.randn(C)
    wide = residual.float()  # the residual stream under autocast
    tensor = x.numel() * x.element_size()

    def norm(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, w, b: ops.layer_norm(x, w, b, backend=name)

    def torch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), w, b)

    def add_norm(name: str, dropout: float = 0.1) -> Callable[..., Tensor]:
        return lambda x, residual, w, b: sum(
            ops.add_layer_norm(x, residual, w, b, dropout_p=dropout, seed=3, backend=name)
        )

    def torch_add_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor, dropout: float = 0.1) -> Tensor:
        total = (F.dropout(x, dropout) if dropout else x) + residual
        return torch_norm(total, w.to(total.dtype), b.to(total.dtype)) + total

    def without(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, residual, w, b: f(x, residual, w, b, dropout=0.0)

    return {
        f"layer_norm C={C}": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: norm(name)(x, w, b)),
                **theirs(bench, torch_norm, lambda f: lambda: f(x, w, b)),
                **liger(lambda its: lambda: its.liger_layer_norm(x, w, b, 1e-5)),
            },
        ),
        f"layer_norm C={C} fwd+bwd": (
            5 * tensor,
            {
                **backends(bench, lambda name: with_gradients(norm(name), x, w, b)),
                **theirs(bench, torch_norm, lambda f: with_gradients(f, x, w, b)),
                **liger(lambda its: with_gradients(lambda x, w, b: its.liger_layer_norm(x, w, b, 1e-5), x, w, b)),
            },
        ),
        f"add_layer_norm C={C}, dropout": (
            4 * tensor,
            {
                **backends(
                    bench, lambda name: lambda: ops.add_layer_norm(x, residual, w, b, dropout_p=0.1, backend=name)
                ),
                **theirs(
                    bench,
                    lambda x, r: (lambda total: (torch_norm(total, w, b), total))(F.dropout(x, 0.1) + r),
                    lambda f: lambda: f(x, residual),
                ),
            },
        ),
        f"add_layer_norm C={C}, fp32 residual, fwd+bwd": (
            (2 + 4 + 4 + 4 + 2 + 4 + 4 + 4 + 4) * x.numel(),
            {
                **backends(bench, lambda name: with_gradients(add_norm(name, 0.0), x, wide, w, b)),
                **theirs(bench, without(torch_add_norm), lambda f: with_gradients(f, x, wide, w, b)),
            },
        ),
    }


def activations(bench: Bench) -> Cases:
    N, C = bench.size(16384, 16), bench.size(4096, 64)
    x, bias = bench.randn(N, C), bench.randn(C)
    tensor = x.numel() * x.element_size()

    def gelu(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, bias: ops.gelu(x, bias, "tanh", backend=name)

    def torch_gelu(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    return {
        "gelu with bias": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: gelu(name)(x, bias)),
                **theirs(bench, torch_gelu, lambda f: lambda: f(x, bias)),
            },
        ),
        "gelu with bias fwd+bwd": (
            5 * tensor,
            {
                **backends(bench, lambda name: with_gradients(gelu(name), x, bias)),
                **theirs(bench, torch_gelu, lambda f: with_gradients(f, x, bias)),
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


def plan(bench: Bench) -> list[str]:
    return list(cases(bench))


def measure(bench: Bench) -> Iterator[Row]:
    return report(bench, cases(bench))


def report(bench: Bench, cases: Cases) -> Iterator[Row]:
    """Measure the cases one after the other, print a line of each, and give its row."""
    copy = bench.ceilings["GB/s"]
    print(f"\n{'all in bfloat16':44}{'GB/s':>8}{'% of copy':>12}" + "".join(f"{f'{n} /':>10}" for n in PEERS))
    for name, (least, makers) in cases.items():
        runs, refused = that_run(makers.items())
        times = bench.milliseconds(runs)
        speeds = {n: least / t / 1e6 for n, t in times.items()}
        percent = {n: 100 * speed / copy for n, speed in speeds.items()}
        row = {"what": name, "ms": times, "GB/s": speeds, "% of copy": percent, "refused": refused, **bench.spread}
        own = times.get("gptfast")
        if own is None:
            print(f"{name:44}{refused['gptfast']}")
        else:
            ratios = [f"{times[n] / own:.2f}x" if n in times else "-" for n in PEERS]
            cells = "".join(f"{r:>10}" for r in ratios)
            print(f"{name:44}{speeds['gptfast']:>8,.0f}{percent['gptfast']:>12.0f}{cells}", flush=True)
        yield row
