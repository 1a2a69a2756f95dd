"""Causal attention beside SDPA's backends and our Triton kernels, in TFLOP/s."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptfast import ops

from .timing import Bench, Row, Run, that_run, with_gradients

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HEAD_DIMS = (64, 80, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SUSTAINED = (32, 1024, 16384)  # lengths that also run back to back for a while
TOKENS, CHANNELS = 16384, 2048  # the same work in every shape, but for what grows with T


def candidates(bench: Bench, dropout: float) -> dict[str, Attention]:
    def own(name: str) -> Attention:
        return lambda q, k, v: ops.causal_attention(q, k, v, dropout_p=dropout, backend=name)

    def sdpa(kind: SDPBackend) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)

        return run

    triton = {"triton": own("triton")} if bench.triton else {}
    return {"gptfast": own(bench.backend), **triton, **{n: sdpa(kind) for n, kind in SDPA.items()}}


def shapes(bench: Bench) -> Iterator[tuple[int, int, float]]:
    """(head dim, length, dropout)."""
    for D in (64,) if bench.tiny else HEAD_DIMS:
        for T in (32,) if bench.tiny else LENGTHS:
            for dropout in (0.0, 0.1):
                yield D, T, dropout


def teraflops(B: int, H: int, T: int, D: int, backward: bool) -> float:
    """Of two products forward and five more backward, half of each behind the mask."""
    return 2 * (7 if backward else 2) * B * H * T * T * D / 2 / 1e12


def name_of(D: int, T: int, dropout: float, backward: bool) -> str:
    return f"attention D={D} T={T} dropout={dropout} {'fwd+bwd' if backward else 'fwd'}"


def decoding(bench: Bench) -> dict[str, tuple[int, int, int, int]]:
    """B, H, S, D of calls with one query a head."""
    shapes = ((1, 12, 1024, 64), (64, 12, 1024, 64)) if not bench.tiny else ((1, 2, 600, 64),)
    return {f"decode attention B={B} H={H} S={S} D={D}": (B, H, S, D) for B, H, S, D in shapes}


def plan(bench: Bench) -> list[str]:
    training = [name_of(*shape, backward) for shape in shapes(bench) for backward in (False, True)]
    return [*decoding(bench), *training]


def measure_decoding(bench: Bench) -> Iterator[Row]:
    """Bytes are what counts: keys and values are read once."""
    for what, (B, H, S, D) in decoding(bench).items():
        q, k, v = bench.randn(B, H, 1, D), bench.randn(B, H, S, D), bench.randn(B, H, S, D)
        peers = {"torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v)}
        for name, f in candidates(bench, 0.0).items():
            if name not in SDPA:
                peers[name] = f
        makers = {name: lambda f=f, qkv=(q, k, v): lambda: f(*qkv) for name, f in peers.items()}
        runs, refused = that_run(makers.items())
        times = bench.milliseconds(runs)
        speeds = {name: 2 * k.numel() * k.element_size() / ms / 1e6 for name, ms in times.items()}
        cells = ", ".join(f"{name} {speed:,.0f} GB/s" for name, speed in speeds.items())
        print(f"{what:40}{cells}", flush=True)
        yield {"what": what, "ms": times, "GB/s": speeds, "refused": refused, **bench.spread}


def measure(bench: Bench) -> Iterator[Row]:
    yield from measure_decoding(bench)
    warnings.simplefilter("ignore", UserWarning)  # why a backend does not take a shape: `refused` has it
    names = ["gptfast", "triton", *SDPA]
    print(f"\n{'causal attention, bfloat16, TFLOP/s':40}" + "".join(f"{name:>12}" for name in names))
    for D, T, dropout in shapes(bench):
        B, H = bench.size(TOKENS // T, 1), bench.size(CHANNELS // D, 2)
        q, k, v = bench.randn(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind()  # views of one product, as in a model
        for backward in (False, True):

            def maker(f: Attention, backward: bool = backward, qkv: tuple[Tensor, ...] = (q, k, v)) -> Run:
                return with_gradients(f, *qkv) if backward else lambda: f(*qkv)

            makers = {n: lambda f=f, maker=maker: maker(f) for n, f in candidates(bench, dropout).items()}
            runs, refused = that_run(makers.items())
            times = bench.milliseconds(runs, rounds=7)
            work = teraflops(B, H, T, D, backward)
            rates = {name: work / ms * 1e3 for name, ms in times.items()}
            what = name_of(D, T, dropout, backward)
            shape = {"D": D, "T": T, "B": B, "H": H, "dropout": dropout, "backward": backward}
            percent = {name: 100 * rate / bench.ceilings["TFLOP/s"] for name, rate in rates.items()}
            row = {"what": what, **shape, "ms": times, "TFLOP/s": rates, "% of matmul": percent, "refused": refused}
            row |= bench.spread
            if "gptfast" in runs and T in SUSTAINED and not dropout:
                row |= bench.sustained(runs["gptfast"], times["gptfast"])
            cells = "".join(f"{rates[n]:>12.1f}" if n in rates else f"{'-':>12}" for n in names)
            print(f"{what:40}{cells}", flush=True)
            report_loss(row)
            yield row


def report_loss(row: dict[str, Any]) -> None:
    """Print a shape that SDPA computes more than a tenth faster."""
    own = row["ms"].get("gptfast")
    peers = {n: t for n, t in row["ms"].items() if n in SDPA}
    if own is None or not peers or row["dropout"] or min(peers.values()) > 0.9 * own:
        return
    best = min(peers, key=peers.__getitem__)
    where = f"D={row['D']} T={row['T']} {'fwd+bwd' if row['backward'] else 'fwd'}"
    print(f"SDPA ({best}) is ahead: {where}: {own / peers[best]:.2f}x")
