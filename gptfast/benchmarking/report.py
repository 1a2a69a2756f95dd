"""Table, JSON file and picture of a set of comparisons. Losses are shown like wins."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gptfast._files import atomic_write, save_figure
from gptfast.benchmarking.compare import COPY, Comparison
from gptfast.machine import Machine
from gptfast.testing import SPECS


def percent_of_limit(c: Comparison, machine: Machine) -> tuple[float | None, str]:
    """Our share of the tighter of the machine's two limits in percent, and that limit: "flops" or "memory".

    The share is None if it exceeds 100: the limit was measured on a busy machine, or data came from the cache.
    """
    size = torch.finfo(c.dtype).bits // 8
    flops, data = c.case.cost(size)
    backward = SPECS[c.case.op].backward_flops if flops else 1.5  # of a pointwise op: 2 reads, 1 write
    passes = 1 + backward * c.backward
    seconds = c.milliseconds["ours"] / 1e3
    arithmetic = flops * passes / machine.peak(c.dtype) if flops else 0.0
    memory = data * passes / (machine.copy_gbs * 1e9)
    floor, what = max((arithmetic, "flops"), (memory, "memory"))
    share = 100 * floor / seconds
    return None if share > 100 else share, what


def print_table(results: list[Comparison], machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=130)
    console.print(
        f"{machine.name}, {machine.threads} threads, {machine.isa}, torch {machine.torch}\n"
        f"limits measured now: fp32 {machine.fp32_gflops:.0f} and bf16 {machine.bf16_gflops:.0f} GFLOP/s, "
        f"copy {machine.copy_gbs:.0f} GB/s, signal between threads {machine.signal_ns:.0f} ns"
    )
    table = Table("op and shape", header_style="bold")
    for title in ("ours, ms", "% of limit", "error", "against", "ms", "speed-up"):
        table.add_column(title, justify="left" if title == "against" else "right")
    for c in results:
        share, what = percent_of_limit(c, machine)
        for n, (peer, ratio) in enumerate(c.ratios.items()):
            error = f"{c.errors[0]:.1f} / {c.errors[1]:.1f}"
            limit = f"? {what}" if share is None else f"{share:.0f} {what}"
            mine = (c.name, f"{c.milliseconds['ours']:.2f}", limit, error) if n == 0 else ("",) * 4
            style = "green" if ratio >= 1 else "red"
            once = ", once" if peer in c.once else ""
            table.add_row(*mine, peer, f"{c.milliseconds[peer]:.2f}{once}", f"[{style}]{ratio:.2f}x[/]")
    console.print(table)
    console.print("error: of results / gradients against fp64 on small inputs, as a multiple of eager PyTorch's")
    if any(percent_of_limit(c, machine)[0] is None for c in results):
        console.print("?: above 100; the limit was measured while the machine was busy, or data came from the cache")
    if any(c.once for c in results):
        console.print("once: a call took longer than all rounds of a case may, and was not repeated")
    for line in losses(results):
        console.print(f"[red]slower:[/] {line}")


def losses(results: list[Comparison]) -> list[str]:
    """One line for each peer that is faster. A copy does less work and is not a peer."""
    behind = [(c, peer, ratio) for c in results for peer, ratio in c.ratios.items() if ratio < 1 and peer != COPY]
    return [f"{c.name} runs at {ratio:.2f} of the speed of {peer}" for c, peer, ratio in behind]


def save_json(results: list[Comparison], machine: Machine, path: Path) -> None:
    rows = [
        {
            "op": c.case.op,
            "case": c.case.id,
            "dtype": str(c.dtype)[6:],
            "backward": c.backward,
            "milliseconds": c.milliseconds,
            "speedup": c.ratios,
            "timed_once": c.once,
            "errors": c.errors,
            "percent_of_limit": percent_of_limit(c, machine),
        }
        for c in results
    ]
    atomic_write(path, json.dumps({"machine": machine.as_dict(), "results": rows}, indent=1).encode())


def save_plot(results: list[Comparison], machine: Machine, path: Path) -> None:
    """Horizontal bars of the speed-up over torch's own function, logarithmic, one line per case."""
    from matplotlib.figure import Figure

    names = [c.name for c in results][::-1]
    speedups = [next(iter(c.ratios.values())) for c in results][::-1]
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(names)), layout="constrained")
    axis = figure.subplots()
    colors = ["#2a7f62" if s >= 1 else "#b23a48" for s in speedups]
    bars = axis.barh(names, speedups, color=colors)
    axis.bar_label(bars, labels=[f"{s:.2f}x" for s in speedups], padding=3, fontsize=8)
    axis.set_xscale("log")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("times as fast as torch's own function")
    axis.set_title(f"{machine.name}, {machine.threads} threads, {machine.isa}", fontsize=10)
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(x=0.15)
    save_figure(figure, path)
