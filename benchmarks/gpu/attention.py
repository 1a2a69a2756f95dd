"""Causal attention beside SDPA's backends and our Triton kernels, in TFLOP/s."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptfast import ops

from .timing import Bench, Run, that_run, with_gradients

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEAD_DIMS = (64, 80, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, CHANNELS = 16384, 2048  # the same work in every shape, but for what grows with T


def candidates(bench: Bench, dropout: float) -> dict[str, Attention]:
    def own(name: str) -> Attention:
        return lambda q, k, v: ops.causal_attention(q, k, v, dropout_p=dropout, backend=name)

    def sdpa(kind: SDPBackend) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)

        return run

    return {"gptfast": own(bench.backend), "triton": own("triton"), **{n: sdpa(kind) for n, kind in SDPA.items()}}


def shapes(bench: Bench) -> Iterator[tuple[int, int, float]]:
    """(head dim, length, dropout)."""
    for D in (64,) if bench.tiny else HEAD_DIMS:
        for T in (32,) if bench.tiny else LENGTHS:
            for dropout in (0.0, 0.1):
                yield D, T, dropout


def teraflops(B: int, H: int, T: int, D: int, backward: bool) -> float:
    """Of two products forward and five more backward, half of each behind the mask."""
    return 2 * (7 if backward else 2) * B * H * T * T * D / 2 / 1e12


def measure(bench: Bench) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore", UserWarning)  # why a backend does not take a shape: `refused` has it
    names = ["gptfast", "triton", *SDPA]
    print(f"\n{'causal attention, bfloat16, TFLOP/s':40}" + "".join(f"{name:>12}" for name in names))
    rows = []
    for D, T, dropout in shapes(bench):
        B, H = bench.size(TOKENS // T, 1), bench.size(CHANNELS // D, 2)
        q, k, v = (bench.randn(B, H, T, D) for _ in range(3))
        for backward in (False, True):

            def maker(f: Attention, backward: bool = backward, qkv: tuple[Tensor, ...] = (q, k, v)) -> Run:
                return with_gradients(f, *qkv) if backward else lambda: f(*qkv)

            makers = {n: lambda f=f, maker=maker: maker(f) for n, f in candidates(bench, dropout).items()}
            runs, refused = that_run(makers.items())
            times = bench.milliseconds(runs, rounds=7)
            work = teraflops(B, H, T, D, backward)
            rates = {name: work / ms * 1e3 for name, ms in times.items()}
            what = f"D={D} T={T} B={B} H={H} dropout={dropout} {'fwd+bwd' if backward else 'fwd'}"
            shape = {"D": D, "T": T, "B": B, "H": H, "dropout": dropout, "backward": backward}
            rows.append({"what": "attention", **shape, "ms": times, "TFLOP/s": rates, "refused": refused})
            cells = "".join(f"{rates[n]:>12.1f}" if n in rates else f"{'-':>12}" for n in names)
            print(f"{what:40}{cells}", flush=True)
    for row in rows:
        report_loss(row)
    return rows


def report_loss(row: dict[str, Any]) -> None:
    """Shapes that SDPA computes faster: those of the forward pass are entries for gptfast/ops/handed_over.py."""
    own = row["ms"].get("gptfast")
    peers = {n: t for n, t in row["ms"].items() if n in SDPA}
    if own is None or not peers or row["dropout"] or min(peers.values()) > 0.9 * own:
        return
    best = min(peers, key=peers.__getitem__)
    where = f"D={row['D']} T={row['T']} {'fwd+bwd' if row['backward'] else 'fwd'}"
    print(f"SDPA ({best}) is ahead: {where}: {own / peers[best]:.2f}x")
