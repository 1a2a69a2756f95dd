"""The ops over the vocabulary: losses, sampling, the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gptfast
from gptfast import ops

from .peers import Cases, Makers, backends, liger, theirs
from .timing import Bench, Run, with_gradients


def losses(bench: Bench) -> Cases:
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
                **theirs(bench, F.cross_entropy, lambda f: lambda: f(logits, targets)),
            },
        ),
        "cross_entropy fwd+bwd": (
            3 * matrix,
            {
                **backends(bench, lambda name: with_gradients(loss(name), logits)),
                **theirs(bench, F.cross_entropy, lambda f: with_gradients(lambda x: f(x, targets), logits)),
                # Liger writes the gradient over the logits: its own
                **liger(lambda its: with_gradients(lambda x: its.liger_cross_entropy(x, targets), logits.clone())),
            },
        ),
        **heads(bench, N, V, targets),
    }


def heads(bench: Bench, N: int, V: int, targets: Tensor) -> Cases:
    """The LM head and its loss together, forward and backward. Least bytes: of hidden, weight and their gradients."""
    C = bench.size(768, 32)
    hidden, weight = bench.randn(N, C), bench.randn(V, C)

    def own(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, w: ops.linear_cross_entropy(h, w, targets, backend=name)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), targets)

    least = 2 * (hidden.numel() + weight.numel()) * 2
    makers: Makers = {
        **backends(bench, lambda name: with_gradients(own(name), hidden, weight)),
        **theirs(bench, plain, lambda f: with_gradients(f, hidden, weight)),
        **liger(
            lambda its: with_gradients(lambda h, w: its.liger_fused_linear_cross_entropy(h, w, targets), hidden, weight)
        ),
    }
    return {f"linear_cross_entropy {N} x {V} fwd+bwd": (least, makers)}


def sampling(bench: Bench) -> Cases:
    logits = bench.randn(bench.size(64, 2), bench.size(50257, 257))

    def uncut(logits: Tensor) -> Tensor:
        """By exponential noise, as gpt-fast draws: without a wait, and without a sort."""
        probs = torch.softmax(logits.float() / 0.8, -1)
        return (probs / torch.empty_like(probs).exponential_(1)).argmax(-1)

    def by_topk(logits: Tensor) -> Tensor:
        values, ids = logits.float().topk(bench.size(50, 5), -1)
        probs = torch.softmax(values / 0.8, -1)
        return ids.gather(-1, (probs / torch.empty_like(probs).exponential_(1)).argmax(-1, keepdim=True))

    def by_sorting(logits: Tensor) -> Tensor:
        probs, ids = torch.softmax(logits.float() / 0.8, -1).sort(-1, descending=True)
        probs = probs * (probs.cumsum(-1) - probs < 0.9)
        return ids.gather(-1, (probs / torch.empty_like(probs).exponential_(1)).argmax(-1, keepdim=True))

    def makers(f: Callable[[Tensor], Tensor], **cut: Any) -> Makers:
        def draw(name: str) -> Run:
            return lambda: ops.sample(logits, temperature=0.8, seed=3, backend=name, **cut)

        return {**backends(bench, draw), **theirs(bench, f, lambda f: lambda: f(logits))}

    least = logits.numel() * logits.element_size()
    rows, V = logits.shape
    cuts = {
        "": makers(uncut),
        ", top_k": makers(by_topk, top_k=bench.size(50, 5)),
        ", top_p 0.9": makers(by_sorting, top_p=0.9),
    }
    return {f"sample {rows} x {V}{name}": (least, runs) for name, runs in cuts.items()}


def tables(bench: Bench) -> Cases:
    """The embedding with ids as in text: the n-th most frequent token 1 / n as often as the first (Zipf)."""
    N, V, C = bench.size(16384, 16), bench.size(50257, 61), bench.size(768, 32)
    table = bench.randn(V, C)
    ids = torch.multinomial(1 / torch.arange(1, V + 1, device=bench.device), N, replacement=True)

    def own(name: str) -> Callable[[Tensor], Tensor]:
        def run(table: Tensor) -> Tensor:
            with gptfast.backend(name):
                return ops.embedding(ids, table)

        return run

    makers: Makers = {
        **backends(bench, lambda name: with_gradients(own(name), table)),
        **theirs(bench, lambda table: F.embedding(ids, table), lambda f: with_gradients(f, table)),
    }
    return {f"embedding {N} of {V}, Zipf, fwd+bwd": ((3 * N + V) * C * 2, makers)}
