"""FLOPs of the operators for `torch.utils.flop_counter.FlopCounterMode`: those of the products that eager PyTorch would take.

As in torch, only matrix products count, 2 M N K each, and a mask saves nothing. What a kernel computes again in its backward
pass, as attention its scores, does not count, so that a model has the same FLOPs whichever backend runs it.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from gptfast._when_imported import when_imported

Shape = Any  # of a tensor; None where there is none


def _linear_fwd(x: Shape, weight: Shape, *others: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * prod(x) * weight[0]


def _linear_bwd(dy: Shape, x: Shape, weight: Shape, want_x: bool, want_weight: bool, want_bias: bool, **_: Any) -> int:
    return 2 * prod(dy) * weight[1] * (want_x + want_weight)


def _grouped_fwd(x: Shape, offsets: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    return 2 * prod(x) * weight[1]


def _grouped_bwd(
    dy: Shape, x: Shape, offsets: Shape, weight: Shape, want_x: bool, want_weight: bool, *others: Any, **_: Any
) -> int:
    return 2 * prod(dy) * weight[2] * (want_x + want_weight)


def _gemm(a: Shape, b: Shape, *others: Any, **_: Any) -> int:
    return 2 * prod(a) * b[1]


def _grouped_gemm(a: Shape, offsets: Shape, b: Shape, *others: Any, **_: Any) -> int:
    return 2 * prod(a) * b[2]


def _lora_fwd(x: Shape, weight: Shape, bias: Shape | None, a: list[Shape], *others: Any, **_: Any) -> int:
    spans = others[2]
    rows = [last - first for first, last in zip(spans[::2], spans[1::2], strict=True)]
    return 2 * prod(x) * weight[0] + sum(2 * M * f[0] * sum(weight) for M, f in zip(rows, a, strict=True))


def _lora_bwd(
    dy: Shape, x: Shape, weight: Shape, a: list[Shape], b: list[Shape], low: list[Shape], *others: Any, **_: Any
) -> int:
    want_x, want_weight, _bias, wanted = others[-4:]
    total, (N, K), n = 2 * prod(x) * weight[0] * (want_x + want_weight), weight, len(a)
    for M_r, of_a, of_b in zip(low, wanted[:n], wanted[n:], strict=True):
        total += 2 * prod(M_r) * (N * of_b + N * (of_a or want_x) + K * of_a + K * want_x)
    return total


def _quantized_linear_fwd(x: Shape, codes: Shape, *others: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * prod(x) * out_shape[-1]


def _quantized_linear_bwd(dy: Shape, *others: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * prod(dy) * out_shape[-1]


def _loss_fwd(backend: str, hidden: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    return 2 * prod(hidden) * weight[0]


def _loss_total(backend: str, hidden: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    return _loss_fwd(backend, hidden, weight) * (1 + sum(others[-2:]))


def _loss_bwd(backend: str, dloss: Shape, hidden: Shape, weight: Shape, *others: Any, **_: Any) -> int:
    return _loss_fwd(backend, hidden, weight) * sum(others[-2:])


def _attention_fwd(q: Shape, k: Shape, *others: Any, **_: Any) -> int:
    return 2 * 2 * prod(q) * k[2]


def _attention_bwd(dout: Shape, q: Shape, k: Shape, *others: Any, **_: Any) -> int:
    return 4 * 2 * prod(q) * k[2]


FORMULAS = {
    "linear_fwd": _linear_fwd,
    "linear_bwd": _linear_bwd,
    "grouped_linear_fwd": _grouped_fwd,
    "grouped_linear_bwd": _grouped_bwd,
    "gemm": _gemm,
    "gemm_few": _gemm,
    "grouped_gemm": _grouped_gemm,
    "gemm_narrow": _gemm,
    "lora_linear_fwd": _lora_fwd,
    "lora_linear_bwd": _lora_bwd,
    "quantized_linear_fwd": _quantized_linear_fwd,
    "quantized_linear_bwd": _quantized_linear_bwd,
    "linear_cross_entropy_fwd": _loss_fwd,
    "linear_cross_entropy_bwd": _loss_bwd,
    "linear_cross_entropy_total": _loss_total,
    "causal_attention_fwd": _attention_fwd,
    "causal_attention_bwd": _attention_bwd,
}


def register(namespace: str) -> None:
    """Give the operators of a namespace of torch.ops their formulas, once torch's counter is imported: it imports Triton, which
    takes 0.2 s and 80 MB."""
    when_imported("torch.utils.flop_counter", lambda: _register(namespace))


def _register(namespace: str) -> None:
    from torch.utils.flop_counter import register_flop_formula

    operators = getattr(torch.ops, namespace)
    for name, formula in FORMULAS.items():
        if hasattr(operators, name):
            register_flop_formula(getattr(operators, name))(formula)
