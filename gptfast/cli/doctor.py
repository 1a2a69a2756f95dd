"""gptfast doctor: the backends on this machine, with reasons, and a self-test of a model's ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gptfast.benchmarking.self_test import OpResult
    from gptfast.cli._problems import Problem
    from gptfast.config import GPTConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_SECONDS = 20.0
_COLUMNS = ("op", "backend", "why", "error", "gradients", "ms", "speed")


def doctor(
    model: Annotated[
        str, typer.Option(help="Whose ops are looked at: a preset, a checkpoint FOLDER, ckpt.pt or a hub id.")
    ] = "gpt2",
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.", min=1)] = 1,
    seq_len: Annotated[
        int, typer.Option(help="Tokens of a sequence; 0: 256, or the model's context if shorter.", min=0)
    ] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Longest self-test; 0: none.", min=0, max=MOST_SECONDS)] = MOST_SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what runs on this machine, and why; test the ops of a model; name the next command for each problem.

    The self-test holds each op against float64, in units of the error that eager PyTorch has there, and times forward and
    backward beside torch's own function. Sizes that would take too long are cut to fewer rows.
    """
    import warnings

    import torch

    from gptfast._busy import CpuWait
    from gptfast.benchmarking.self_test import self_test
    from gptfast.cli._problems import find_problems
    from gptfast.machine import choose_dtype, resolve_device

    if dtype not in DTYPES:
        raise ValueError(f"doctor: --dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    config = _config(model)
    if seq_len > config.block_size:
        raise ValueError(f"doctor: --seq-len is {seq_len}; the context of {model} is {config.block_size}")
    seq_len = seq_len or min(256, config.block_size)
    device = resolve_device("doctor", "auto").type
    name = choose_dtype(device)[0] if dtype == "auto" else dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table has the same
        rows = report()
        wait = CpuWait()
        results = self_test(config, batch_size, seq_len, getattr(torch, name), device, seconds)
        problems = find_problems(results, name, wait.share())
    shape = f"{model}, {batch_size} x {seq_len} tokens, {name}, on {device}"
    if as_json:
        _print_json(shape, rows, results, problems)
    else:
        _print_tables(shape, rows, results, problems, seconds)


def _config(model: str) -> GPTConfig:
    from gptfast._snapshots import read_whole
    from gptfast.config import PRESETS, GPTConfig
    from gptfast.models.locate import resolve
    from gptfast.models.stored import read_settings

    if model in PRESETS:
        return GPTConfig.preset(model)
    folder = resolve(model)
    return read_whole(folder, lambda: read_settings(folder))[0]


def _print_json(shape: str, rows: list[tuple[str, str]], results: list[OpResult], problems: list[Problem]) -> None:
    import json
    from dataclasses import asdict

    said = {"shape": shape, "machine": dict(rows), "ops": results, "problems": problems}
    print(json.dumps(said, default=asdict, indent=2))


def _print_tables(
    shape: str, rows: list[tuple[str, str]], results: list[OpResult], problems: list[Problem], seconds: float
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from gptfast.benchmarking.self_test import untimed

    console = Console()
    table = Table("part", "on this machine", box=None, header_style="bold", pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    console.print(f"\n{shape}", highlight=False)
    columns = [Column(name, no_wrap=name not in ("why", "speed")) for name in _COLUMNS]
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for r in results:
        speed = "" if r.ratio is None else f"{r.ratio:.2f}x {r.peer}"
        errors = ("wrong", "") if r.wrong else (_number(r.results), _number(r.gradients))
        table.add_row(r.op, r.backend, r.reason, *errors, _number(r.milliseconds), speed)
    console.print(table)
    if seconds:
        console.print("error: against float64, 1 is eager PyTorch's; ms: forward and backward, of at most some rows")
    if seconds and (left := untimed(results)):
        console.print(f"not timed: {', '.join(dict.fromkeys(left))}")
    for problem in problems:
        console.print(f"\n[bold]problem[/bold]: {escape(problem.problem)}", highlight=False)
        console.print(f"  next: {problem.next}", highlight=False, markup=False, soft_wrap=True)  # a line to copy
    if not problems:
        console.print("\nno problem was found", highlight=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def report() -> list[tuple[str, str]]:
    """The rows (name, value) of the table."""
    import platform

    import torch

    import gptfast
    from gptfast.backend import cpu_isa, cpu_isas, has_cpu_ops, missing_reason
    from gptfast.machine import cpu_name

    cpu = "eager PyTorch" if not has_cpu_ops else f"compiled kernels, {cpu_isa()}"
    rows = [
        ("gptfast", f"{gptfast.__version__} (Python {platform.python_version()}, torch {torch.__version__})"),
        ("processor", f"{cpu_name()}, {torch.get_num_threads()} threads"),
        ("ops on the CPU", cpu + (f": {missing_reason}" if missing_reason else "")),
    ]
    if has_cpu_ops:
        from gptfast import _C

        usable = ", ".join(cpu_isas())
        built = _C.build_info()
        rows.append(("instruction sets", f"{usable} (GPTFAST_CPU_ISA forces one)"))
        rows.append(("built with", f"{built['compiler']}, headers of torch {built['torch_headers']}"))
        rows.append(("CUDA ops built", built["cuda"] or "no (GPTFAST_CUDA=1 when installing, where nvcc is found)"))
    rows.append(("ops on CUDA", _cuda_status()))
    rows.append(("ops on Triton", _triton_status()))
    return rows


def _cuda_status() -> str:
    import torch

    from gptfast.backend import missing_cuda_reason, ops_of, unavailable_reason

    if missing_cuda_reason is not None and not torch.cuda.is_available():
        return missing_cuda_reason
    gpu = torch.cuda.get_device_name()
    reason = unavailable_reason("cuda")
    if reason is not None:
        return f"{gpu}: every op in eager PyTorch, because {reason}"
    return f"{gpu}: compiled kernels for {', '.join(sorted(ops_of('cuda')))}"


def _triton_status() -> str:
    from importlib.metadata import version

    from gptfast.backend import ops_of, unavailable_reason
    from gptfast.triton import INTERPRETING

    if reason := unavailable_reason("triton"):
        return reason
    how = "where auto finds no CUDA ops, or asked for"
    if INTERPRETING:
        how = "interpreted on the CPU (TRITON_INTERPRET is set), when asked for"
    return f"Triton {version('triton')}, {how}: kernels for {', '.join(sorted(ops_of('triton')))}"
