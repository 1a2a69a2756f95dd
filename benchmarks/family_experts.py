"""Experts in bench_family.py: products over the rows of each, a mixture of them, and one token's beside reading their bytes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from family_rounds import DTYPES, GPT_OSS, Call, Row, milliseconds, ratio, turns, with_gradients
from torch import Tensor

import gptfast
from gptfast import ops
from gptfast.ops import reference


def torch_moe(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As transformers' gpt-oss computes it: a product for each expert over the tokens that it has."""
    total = torch.zeros_like(x)
    for e in range(len(gate_up)):
        tokens, places = torch.where(experts == e)
        hidden = F.linear(x[tokens], gate_up[e])
        gate, up = hidden[:, ::2].clamp(max=7.0), hidden[:, 1::2].clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        share = weights[tokens, places, None]
        total = total.index_add(0, tokens, F.linear(hidden, down[e]) * share)
    return total


def moe_inputs(N: int, options: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, ...]:
    E, k, C = options.experts, options.chosen, options.width
    g = torch.Generator().manual_seed(0)
    experts, weights = ops.route(torch.randn(N, E, generator=g), k)
    matrices = ((torch.randn(E, rows, C, generator=g) * C**-0.5).to(dtype) for rows in (2 * C, C))
    return torch.randn(N, C, generator=g).to(dtype), experts, weights.to(dtype), *matrices


def expert_calls(op: str, inputs: tuple[Tensor, ...], backward: bool) -> dict[str, Call]:
    """Ours and the loop of torch's products, of the same inputs."""
    x, chosen, weights, *matrices = inputs
    if op == "moe":
        leaves = [t.clone().requires_grad_(backward) for t in (x, *matrices)]
        a, b, c = leaves
        calls: dict[str, Call] = {
            "ours": lambda: ops.moe(a, chosen, weights, b, c, **GPT_OSS),
            "loop": lambda: torch_moe(a, chosen, weights, b, c),
        }
    else:
        rows = x.repeat_interleave(chosen.shape[1], 0)
        offsets = F.pad(torch.bincount(chosen.flatten(), minlength=len(matrices[0])).cumsum(0), (1, 0))
        leaves = [t.clone().requires_grad_(backward) for t in (rows, matrices[0])]
        a, b = leaves
        calls = {
            "ours": lambda: ops.grouped_linear(a, offsets, b),
            "loop": lambda: reference.grouped_linear(a, offsets, b),
        }
    return {kind: with_gradients(call, leaves) for kind, call in calls.items()} if backward else calls


def experts(options: argparse.Namespace) -> Iterator[Row]:
    N, E, k, C = options.tokens, options.experts, options.chosen, options.width
    for name, dtype in DTYPES.items():
        inputs = moe_inputs(N, options, dtype)
        close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
        torch.testing.assert_close(ops.moe(*inputs, **GPT_OSS), torch_moe(*inputs), **close)
        for op, flops in {"grouped_linear": 4 * N * k * C * C, "moe": 6 * N * k * C * C}.items():
            for backward in (False, True):
                times = turns(expert_calls(op, inputs, backward), options)
                done = (3 if backward else 1) * flops / statistics.median(times["ours"])
                yield {
                    **{"op": op, "shape": f"N{N} E{E} k{k} C{C} F{C}", "dtype": name},
                    **{"mode": "fwd+bwd" if backward else "fwd", "ms": milliseconds(times["ours"])},
                    **{"loop_ms": milliseconds(times["loop"]), "of_loop": ratio(times, "loop", "ours")},
                    "of_peak": round(done / options.peaks[name], 3),
                }


def one_token(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of one token, and of reading the bytes of its experts: each time to experts that the time before did not have, so
    that their weights come from memory."""
    E, k = options.experts, options.chosen
    x, _, weights, gate_up, down = moe_inputs(1, options, dtype)
    groups, reads = (cycle(torch.arange(E - E % k).view(-1, k)) for _ in range(2))

    def token() -> None:
        ops.moe(x, next(groups)[None], weights, gate_up, down, **GPT_OSS)

    def read() -> None:
        for e in next(reads).tolist():
            for matrix in (gate_up[e], down[e]):
                matrix.view(torch.float32).amax()

    with torch.no_grad():
        return turns({"ours": token, "read": read}, options)


def decode(options: argparse.Namespace) -> Iterator[Row]:
    E, k, C = options.experts, options.chosen, options.width
    for name, dtype in DTYPES.items():
        times, size = one_token(options, dtype), 3 * k * C * C * dtype.itemsize
        yield {
            **{"op": "moe, one token", "shape": f"E{E} k{k} C{C} F{C}", "dtype": name},
            **{
                "ms": milliseconds(times["ours"]),
                "of_reading": ratio(times, "read", "ours"),
                "active_mb": round(size / 1e6, 1),
            },
            "read_gb_per_s": round(size / statistics.median(times["read"]) / 1e9, 1),
        }
    for preset in ("gpt-oss-20b", "gpt-oss-120b"):
        config = gptfast.GPTConfig.preset(preset)
        weights_of_token = 3 * config.n_layer * (config.n_expert_per_tok or 0) * config.n_embd * config.inner_dim
        sizes = {"mxfp4_gb": 4.25, "bf16_gb": 16}  # bits of a weight
        read = {name: round(weights_of_token * bits / 8e9, 2) for name, bits in sizes.items()}
        yield {"op": "experts of a token", "shape": preset, **read}
