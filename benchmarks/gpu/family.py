"""The ops of Llama-shaped GPTs and of gpt-oss that move memory: RMSNorm, rotary positions, SwiGLU, squared ReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import ops
from gptfast.testing.ops import rotary, swiglu

from .memory_bound import report
from .peers import Cases, backends, liger, theirs
from .timing import Bench, Row, with_gradients


def cases(bench: Bench) -> Cases:
    return {**norms(bench), **head_norms(bench), **positions(bench), **gates(bench), **squares(bench)}


def norms(bench: Bench) -> Cases:
    N, C = bench.size(16384, 16), bench.size(2048, 64)
    x, w = bench.randn(N, C), bench.randn(C)
    stream = bench.randn(N, C).float()  # the residual stream under autocast; the next product takes bfloat16
    tensor = x.numel() * x.element_size()

    def norm(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: ops.rms_norm(x, w, backend=name)

    def torch_norm(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (C,), w, 1e-6)

    def add_norm(name: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda x, stream, w: ops.add_rms_norm(x, stream, w, out_dtype=torch.bfloat16, backend=name)

    def torch_add_norm(x: Tensor, stream: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + stream
        return torch_norm(total, w.to(total.dtype)).bfloat16(), total

    return {
        f"rms_norm C={C}": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: norm(name)(x, w)),
                **theirs(bench, torch_norm, lambda f: lambda: f(x, w)),
                **liger(lambda its: lambda: its.liger_rms_norm(x, w, 1e-6)),
            },
        ),
        f"rms_norm C={C} fwd+bwd": (
            5 * tensor,
            {
                **backends(bench, lambda name: with_gradients(norm(name), x, w)),
                **theirs(bench, torch_norm, lambda f: with_gradients(f, x, w)),
                **liger(lambda its: with_gradients(lambda x, w: its.liger_rms_norm(x, w, 1e-6), x, w)),
            },
        ),
        f"add_rms_norm C={C}, fp32 residual": (
            (2 + 4 + 4 + 2) * x.numel(),
            {
                **backends(bench, lambda name: lambda: add_norm(name)(x, stream, w)),
                **theirs(bench, torch_add_norm, lambda f: lambda: f(x, stream, w)),
            },
        ),
        f"add_rms_norm C={C}, fp32 residual, fwd+bwd": (
            (2 + 4 + 4 + 2 + 2 + 4 + 4 + 4 + 2) * x.numel(),
            {
                **backends(bench, lambda name: with_gradients(add_norm(name), x, stream, w)),
                **theirs(bench, torch_add_norm, lambda f: with_gradients(f, x, stream, w)),
            },
        ),
    }


def head_norms(bench: Bench) -> Cases:
    """QK-norm: rows of one head."""
    N, D = bench.size(16384 * 16, 64), bench.size(128, 16)
    x, w = bench.randn(N, D), bench.randn(D)
    tensor = x.numel() * x.element_size()

    def norm(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: ops.rms_norm(x, w, backend=name)

    def torch_norm(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), w, 1e-6)

    return {
        f"rms_norm of heads of {D}": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: norm(name)(x, w)),
                **theirs(bench, torch_norm, lambda f: lambda: f(x, w)),
                **liger(lambda its: lambda: its.liger_rms_norm(x, w, 1e-6)),
            },
        ),
        f"rms_norm of heads of {D} fwd+bwd": (
            5 * tensor,
            {
                **backends(bench, lambda name: with_gradients(norm(name), x, w)),
                **theirs(bench, torch_norm, lambda f: with_gradients(f, x, w)),
                **liger(lambda its: with_gradients(lambda x, w: its.liger_rms_norm(x, w, 1e-6), x, w)),
            },
        ),
    }


def positions(bench: Bench) -> Cases:
    """Queries of a projection of q, k and v, as a model makes them. Liger turns queries and keys in one call, in place."""
    (B, H, T, D), found = bench.sizes((8, 32, 2048, 128), (1, 2, 16, 16)), {}
    qkv = bench.randn(B, T, 3, H, D)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    cos, sin = ops.rotary_tables(T, D, device=bench.device)
    doubled = [torch.cat([t, t], -1)[None].bfloat16() for t in (cos, sin)]
    for layout in ("neox", "interleaved"):
        makers = {
            **backends(
                bench,
                lambda name, layout=layout: (
                    lambda: [ops.rotary(x, cos, sin, layout=layout, backend=name) for x in (q, k)]
                ),
            )
        }
        if layout == "neox":
            makers |= theirs(bench, rotary.peer, lambda f: lambda: [f(x, cos, sin) for x in (q, k)])
            makers |= liger(lambda its: lambda: its.liger_rope(q, k, *doubled))
        found[f"rotary of q and k, {layout}"] = (4 * q.numel() * q.element_size(), makers)
    return found


def gates(bench: Bench) -> Cases:
    N, C = bench.size(16384, 16), bench.size(5632, 64)
    gate, up = bench.randn(N, C), bench.randn(N, C)
    both = bench.randn(N, 2 * bench.size(2880, 32))  # gate and up of gpt-oss in turn
    tensor, half = gate.numel() * gate.element_size(), both.numel()

    def plain(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda gate, up: ops.swiglu(gate, up, backend=name)

    def clamped(name: str) -> Callable[[Tensor], Tensor]:
        return lambda both: ops.swiglu(both, layout="interleaved", **swiglu.GPT_OSS, backend=name)

    def torch_plain(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu.peer(gate, up)

    def torch_clamped(both: Tensor) -> Tensor:
        return swiglu.peer(both, None, **swiglu.GPT_OSS)

    return {
        "swiglu": (
            3 * tensor,
            {
                **backends(bench, lambda name: lambda: plain(name)(gate, up)),
                **theirs(bench, torch_plain, lambda f: lambda: f(gate, up)),
                **liger(lambda its: lambda: its.liger_swiglu(gate, up)),
            },
        ),
        "swiglu fwd+bwd": (
            8 * tensor,
            {
                **backends(bench, lambda name: with_gradients(plain(name), gate, up)),
                **theirs(bench, torch_plain, lambda f: with_gradients(f, gate, up)),
                **liger(lambda its: with_gradients(its.liger_swiglu, gate, up)),
            },
        ),
        "swiglu of gpt-oss": (
            3 * half,
            {
                **backends(bench, lambda name: lambda: clamped(name)(both)),
                **theirs(bench, torch_clamped, lambda f: lambda: f(both)),
            },
        ),
        "swiglu of gpt-oss fwd+bwd": (
            8 * half,
            {
                **backends(bench, lambda name: with_gradients(clamped(name), both)),
                **theirs(bench, torch_clamped, lambda f: with_gradients(f, both)),
            },
        ),
    }


def squares(bench: Bench) -> Cases:
    x = bench.randn(bench.size(16384, 16), bench.size(4096, 64))
    tensor = x.numel() * x.element_size()

    def ours(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.relu_squared(x, backend=name)

    def torch_own(x: Tensor) -> Tensor:
        return F.relu(x).square()

    return {
        "relu_squared": (
            2 * tensor,
            {
                **backends(bench, lambda name: lambda: ours(name)(x)),
                **theirs(bench, torch_own, lambda f: lambda: f(x)),
            },
        ),
        "relu_squared fwd+bwd": (
            5 * tensor,
            {
                **backends(bench, lambda name: with_gradients(ours(name), x)),
                **theirs(bench, torch_own, lambda f: with_gradients(f, x)),
            },
        ),
    }


def plan(bench: Bench) -> list[str]:
    return list(cases(bench))


def measure(bench: Bench) -> Iterator[Row]:
    return report(bench, cases(bench))
