"""gptfast doctor: the backends on this machine, with reasons."""

from __future__ import annotations


def doctor() -> None:
    """Show what runs on this machine, and why: CPU instruction set, threads, compiled ops, CUDA, Triton, versions."""
    import warnings

    from rich.console import Console
    from rich.table import Table

    table = Table("part", "on this machine", box=None, header_style="bold", pad_edge=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table has the same
        rows = report()
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


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
