"""A case, one input of one op; and what tests and benchmarks know of an op."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Tensor | None, ...]
Maker = Callable[["Case", torch.dtype, torch.Generator], Inputs]
Cost = Callable[["Case", int], tuple[float, float]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One input of one op: named dimensions (B T S H D C V N), options of the call, and the layout in memory."""

    op: str
    dims: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"  # or "strided": rows with gaps, from one larger buffer
    bench: bool = False  # timed by the benchmarks instead of being tested
    slow_reference: bool = False  # the eager reference would take minutes or most of the memory at this size

    def __post_init__(self) -> None:
        if self.options.get("dropout_p", self.options.get("p", 0)) > 0:
            self.options.setdefault("seed", 0)  # or each call would draw its mask

    @property
    def id(self) -> str:
        """Such as `B2H3T113D59-strided-dropout_p0.1`."""
        parts = ["".join(f"{k}{v}" for k, v in self.dims.items())]
        parts += [self.layout] * (self.layout != "contiguous")
        parts += [k if v is True else f"{k}{_short(v)}" for k, v in self.options.items() if k not in ("seed", "offset")]
        return "-".join(parts)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Fresh positional arguments of the op, on the CPU."""
        return SPECS[self.op].make(self, dtype, torch.Generator().manual_seed(seed))

    def cost(self, element_size: int) -> tuple[float, float]:
        """(flops, bytes) of a forward call: the least that any implementation must do and move."""
        cost = SPECS[self.op].cost
        if cost is None:
            raise ValueError(f"{self.op}: gptfast/testing/ops/{self.op}.py states no cost, which benchmarks need")
        return cost(self, element_size)


@dataclass(frozen=True)
class Spec:
    """What tests and benchmarks know of an op.

    Args:
        cases: the table of inputs; those with `bench=True` are for the benchmarks.
        make: positional arguments of a case.
        cost: the least flops and bytes of a case; None: it is not benchmarked.
        peer: a label and torch's own function, called like the op; None: torch has none.
        backward_flops: of a backward call, as a multiple of the forward's; 2 for products.
        has_backward: whether the benchmarks time the gradients too.
        non_differentiable: positions of float arguments that get no gradient.
        floors: for results and for gradients by dtype, in eps of it times the largest value of the row (`accuracy`); where
            a kernel computes with less on purpose. The comments have the largest that was needed on any ISA and on the
            emulated CUDA kernels, over five seeds.
    """

    cases: list[Case]
    make: Maker
    cost: Cost | None = None
    peer: tuple[str, Callable[..., Any]] | None = None
    backward_flops: float = 2.0
    has_backward: bool = True
    non_differentiable: tuple[int, ...] = ()
    floors: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)


SPECS: dict[str, Spec] = {}  # by op; gptfast/testing/ops fills it


def cases(op: str) -> list[Case]:
    """The cases that the parity tests of `op` run (those for the benchmarks alone left out)."""
    return [c for c in SPECS[op].cases if not c.bench]


def bench_cases(op: str) -> list[Case]:
    """The cases that the benchmarks time."""
    return [c for c in SPECS[op].cases if c.bench]


def dtypes() -> list[Any]:
    """pytest parameters over the kernels' dtypes."""
    import pytest

    return [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return "_".join(map(str, value.tolist()))
    if isinstance(value, torch.dtype):
        return next(name for name, dtype in DTYPES.items() if dtype == value)
    return str(value)


# ---- for the tables -----------------------------------------------------------------------------------------------


def randn(case: Case, dtype: torch.dtype, g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values; "strided" leaves a gap of three values after every row, so rows are misaligned too."""
    gap = 3 if case.layout == "strided" else 0
    x = (torch.randn(*shape[:-1], shape[-1] + gap, generator=g) * scale).to(dtype)
    return x[..., : shape[-1]]


def norm_inputs(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """x (around 1, so that the mean matters), then weight and bias, in float32 where the case says so."""
    N, C = c.dims["N"], c.dims["C"]
    weights = torch.float32 if c.dims.get("fp32_weights") else dtype
    x = randn(c, dtype, g, N, C) + 1
    bias = torch.randn(C, generator=g).to(weights) if c.dims.get("bias", 1) else None
    return x if c.layout == "contiguous" else randn(c, dtype, g, N, C), torch.randn(C, generator=g).to(weights), bias


def targets(case: Case, g: torch.Generator) -> Tensor:
    """Class indices, every fifth of them ignored."""
    result = torch.randint(case.dims["V"], (case.dims["N"],), generator=g)
    result[1::5] = case.options.get("ignore_index", -100)
    return result


def rows(op: str, N: int, C: int, layout: str = "contiguous", bench: bool = False, **extra: Any) -> Case:
    """A case over (N, C); bias, no_weight, fp32_weights and fp32_residual are dimensions, all else options."""
    names = ("bias", "no_weight", "fp32_weights", "fp32_residual")
    dims = {"N": N, "C": C, **{k: extra.pop(k) for k in names if k in extra}}
    return Case(op, dims, extra, layout, bench)


def pointwise(reads_and_writes: int) -> Cost:
    """The cost of this many passes over (N, C)."""
    return lambda c, size: (0.0, reads_and_writes * math.prod(c.dims[k] for k in "NC") * size)


def over_logits(reads_and_writes: int) -> Cost:
    """The cost of this many passes over (N, V)."""
    return lambda c, size: (0.0, reads_and_writes * c.dims["N"] * c.dims["V"] * size)
