"""gptfast bench: time the ops against eager PyTorch and torch's functions on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to time, such as gelu. Default: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("runs/bench"),
    rounds: Annotated[
        int | None,
        typer.Option(
            min=3,
            help="Interleaved rounds (gptfast, peer, gptfast, peer, …) per case, at most 4 seconds of them, or three. "
            "A peer whose call takes longer is called once. "
            "Default: 7, and 40 beside busy loops, where single calls differ by a factor of three.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's choice.")] = 0,
    tune_malloc: Annotated[
        bool, typer.Option("--tune-malloc", help="Let glibc keep large buffers, for gptfast and the peers.")
    ] = False,
    busy: Annotated[
        int, typer.Option(min=0, help="Busy loops that run beside, each as a program that would take a core.")
    ] = 0,
) -> None:
    """Time the ops against eager PyTorch and torch's functions; print a table, write JSON and a plot.

    gptfast and the peers alternate in one run, and the ratio is the median over the rounds, so that a machine whose
    speed drifts favours neither. Each op's results are checked against float64 before it is timed.
    """
    import torch
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    import gptfast
    from gptfast.benchmarking import (
        busy_loops,
        compare,
        comparisons,
        count_comparisons,
        measure_machine,
        print_table,
        save_json,
        save_plot,
    )
    from gptfast.testing import CASES

    unknown = sorted(set(ops or []) - set(CASES))
    if unknown:
        raise ValueError(f"bench: no op named {', '.join(unknown)}; expected some of {', '.join(CASES)}")
    if threads:
        torch.set_num_threads(threads)
    if tune_malloc and not gptfast.tune_malloc():
        raise RuntimeError("bench: --tune-malloc needs glibc; leave it out here")
    out.mkdir(parents=True, exist_ok=True)  # before minutes of work: it may not be writable
    machine = measure_machine()
    print("malloc: " + ("tuned (gptfast.tune_malloc)" if tune_malloc else "as installed"))
    if busy:
        print(f"{busy} busy loops beside; the limits are measured without them")
    results = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with busy_loops(busy), Progress(*columns, transient=True) as progress:
        task = progress.add_task("checking", total=count_comparisons(ops))
        for c in comparisons(ops):
            progress.update(task, description=c.name)
            results.append(compare(c, rounds or (40 if busy else 7)))
            progress.advance(task)
    machine = machine.measured_again()
    print_table(results, machine)
    save_json(results, machine, out / "bench.json")
    save_plot(results, machine, out / "bench.png")
    print(f"wrote {out / 'bench.json'} and {out / 'bench.png'}")
