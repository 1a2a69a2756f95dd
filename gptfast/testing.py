"""One case table per op, shared by the tests and the benchmarks, and the accuracy rule they are held to.

The rule (`assert_accurate`): the error against the same op in float64 may be at most `factor` times the error of eager
PyTorch in the same dtype (2 for results, 3 for gradients), plus a floor of a few units in the last place of the largest
value about. The tolerance is thus what PyTorch itself achieves on the same input, not a number chosen by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOOR = 4  # units in the last place of the largest magnitude among the results (or among the gradients) of a call


@dataclass(frozen=True)
class Case:
    """One input of one op: named dimensions (B T S H D C V N), options of the call, and the layout in memory."""

    op: str
    dims: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"  # or "strided": rows with gaps, from one larger buffer
    bench: bool = False  # timed by the benchmarks instead of being tested
    slow_reference: bool = False  # the eager reference would take minutes or most of the memory at this size

    @property
    def id(self) -> str:
        """Such as `B2H3T113D59-strided-dropout_p0.1`."""
        parts = ["".join(f"{k}{v}" for k, v in self.dims.items())]
        parts += [self.layout] * (self.layout != "contiguous")
        parts += [k if v is True else f"{k}{_short(v)}" for k, v in self.options.items() if k not in ("seed", "offset")]
        return "-".join(parts)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor | None, ...]:
        """Fresh positional arguments of the op, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return _MAKERS[self.op](self, dtype, generator)

    def cost(self, element_size: int) -> tuple[float, float]:
        """(flops, bytes) of a forward call: the least that any implementation must do and move."""
        return _COSTS[self.op](self, element_size)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return "_".join(map(str, value.tolist()))
    return str(value)


# ---- inputs -------------------------------------------------------------------------------------------------------


def _randn(case: Case, dtype: torch.dtype, g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values; "strided" leaves a gap of three values after every row, so rows are misaligned too."""
    gap = 3 if case.layout == "strided" else 0
    x = (torch.randn(*shape[:-1], shape[-1] + gap, generator=g) * scale).to(dtype)
    return x[..., : shape[-1]]


def _make_gelu(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    N, C = c.dims["N"], c.dims["C"]
    bias = torch.randn(C, generator=g).to(dtype) if c.dims.get("bias", 1) else None
    return _randn(c, dtype, g, N, C, scale=3.0), bias


def _make_attention(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    B, H, T, D = (c.dims[k] for k in "BHTD")
    S = c.dims.get("S", T)
    if c.layout == "strided":  # one projection of q, k and v, as a model makes it
        x = torch.randn(B, max(T, S), 3, H, D, generator=g).to(dtype)
        return tuple(x[:, :n, i].transpose(1, 2) for i, n in enumerate((T, S, S)))
    return tuple(torch.randn(B, H, n, D, generator=g).to(dtype) for n in (T, S, S))


def _make_norm(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    """x (around 1, so that the mean matters), then weight and bias, in float32 where the case says so."""
    N, C = c.dims["N"], c.dims["C"]
    weights = torch.float32 if c.dims.get("fp32_weights") else dtype
    x = _randn(c, dtype, g, N, C) + 1
    bias = torch.randn(C, generator=g).to(weights) if c.dims.get("bias", 1) else None
    return x if c.layout == "contiguous" else _randn(c, dtype, g, N, C), torch.randn(C, generator=g).to(weights), bias


def _make_add_norm(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    x, weight, bias = _make_norm(c, dtype, g)
    residual = _randn(c, torch.float32 if c.dims.get("fp32_residual") else dtype, g, c.dims["N"], c.dims["C"])
    return x, residual, weight, bias


def _make_dropout(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    return (_randn(c, dtype, g, c.dims["N"], c.dims["C"]),)


def _make_targets(c: Case, g: torch.Generator) -> Tensor:
    targets = torch.randint(c.dims["V"], (c.dims["N"],), generator=g)
    targets[1::5] = c.options.get("ignore_index", -100)
    return targets


def _make_loss(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    return _randn(c, dtype, g, c.dims["N"], c.dims["V"], scale=3.0), _make_targets(c, g)


def _make_linear_loss(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    N, C, V = (c.dims[k] for k in "NCV")
    return _randn(c, dtype, g, N, C), (torch.randn(V, C, generator=g) * C**-0.5).to(dtype), _make_targets(c, g)


def _make_linear(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    N, C, M = (c.dims[k] for k in "NCM")
    bias = torch.randn(M, generator=g).to(dtype) if c.dims.get("bias", 1) else None
    return _randn(c, dtype, g, N, C), (torch.randn(M, C, generator=g) * C**-0.5).to(dtype), bias


def _make_quantized(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    N, C, M = (c.dims[k] for k in "NCM")
    weight, format, size = torch.randn(M, C, generator=g) * C**-0.5, c.options["format"], c.options["group_size"]
    if format == "nf4":
        codes, scales = ops.quantize_nf4(weight, block_size=size).rows(M)
    else:
        scale_dtype = torch.float32 if c.dims.get("fp32_scales") else torch.float16
        codes, scales = ops.quantize_groups(weight, format, group_size=size, scale_dtype=scale_dtype)
    bias = torch.randn(M, generator=g).to(dtype) if c.dims.get("bias", 1) else None
    return _randn(c, dtype, g, N, C), codes, scales, bias


def _make_nf4(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    weight = torch.randn(c.options["shape"], generator=g)
    return ops.quantize_nf4(weight, block_size=c.options["block_size"], double=bool(c.dims.get("double")))


def _make_sample(c: Case, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor | None, ...]:
    return (_randn(c, dtype, g, c.dims["N"], c.dims["V"], scale=3.0),)


_MAKERS: dict[str, Callable[[Case, torch.dtype, torch.Generator], tuple[Tensor | None, ...]]] = {
    "gelu": _make_gelu,
    "causal_attention": _make_attention,
    "layer_norm": _make_norm,
    "add_layer_norm": _make_add_norm,
    "dropout": _make_dropout,
    "cross_entropy": _make_loss,
    "linear": _make_linear,
    "linear_cross_entropy": _make_linear_loss,
    "dequantize_nf4": _make_nf4,
    "quantized_linear": _make_quantized,
    "sample": _make_sample,
}
FROZEN = {"quantized_linear": (2,), "dequantize_nf4": (1, 2, 3)}  # arguments that are floats and have no gradient


# ---- least work ---------------------------------------------------------------------------------------------------


def _attention_cost(c: Case, size: int) -> tuple[float, float]:
    B, H, T, D = (c.dims[k] for k in "BHTD")
    S = c.dims.get("S", T)
    visible = T * S - T * (T - 1) / 2 if c.options.get("causal", True) and T <= S else T * S
    return 4.0 * B * H * visible * D, B * H * D * (2 * T + 2 * S) * size


def _pointwise(reads_and_writes: int) -> Callable[[Case, int], tuple[float, float]]:
    return lambda c, size: (0.0, reads_and_writes * math.prod(c.dims[k] for k in "NC") * size)


def _over_logits(reads_and_writes: int) -> Callable[[Case, int], tuple[float, float]]:
    return lambda c, size: (0.0, reads_and_writes * c.dims["N"] * c.dims["V"] * size)


def _linear_loss_cost(c: Case, size: int) -> tuple[float, float]:
    N, C, V = (c.dims[k] for k in "NCV")
    return 2.0 * N * C * V, (N * C + V * C) * size


def _linear_cost(c: Case, size: int) -> tuple[float, float]:
    N, C, M = (c.dims[k] for k in "NCM")
    return 2.0 * N * C * M, (N * C + N * M + C * M) * size


_COSTS: dict[str, Callable[[Case, int], tuple[float, float]]] = {
    "gelu": _pointwise(2),
    "causal_attention": _attention_cost,
    "layer_norm": _pointwise(2),
    "add_layer_norm": _pointwise(4),
    "dropout": _pointwise(2),
    "cross_entropy": _over_logits(1),
    "linear": _linear_cost,
    "linear_cross_entropy": _linear_loss_cost,
    "sample": _over_logits(1),
}


# ---- the tables ---------------------------------------------------------------------------------------------------


def _attention(
    B: int, H: int, T: int, D: int, S: int | None = None, layout: str = "contiguous", **options: Any
) -> Case:
    dims = {"B": B, "H": H, "T": T, **({} if S is None else {"S": S}), "D": D}
    return Case("causal_attention", dims, options, layout)


def _rows(op: str, N: int, C: int, layout: str = "contiguous", bench: bool = False, **extra: Any) -> Case:
    """A case over (N, C); bias, fp32_weights and fp32_residual are dimensions, all else options."""
    dims = {"N": N, "C": C, **{k: extra.pop(k) for k in ("bias", "fp32_weights", "fp32_residual") if k in extra}}
    return Case(op, dims, extra, layout, bench)


def _loss(N: int, V: int, layout: str = "contiguous", bench: bool = False, **options: Any) -> Case:
    return Case("cross_entropy", {"N": N, "V": V}, options, layout, bench)


def _linear(N: int, C: int, M: int, layout: str = "contiguous", bench: bool = False, **extra: Any) -> Case:
    dims = {"N": N, "C": C, "M": M, **{k: extra.pop(k) for k in ("bias",) if k in extra}}
    return Case("linear", dims, extra, layout, bench)


def _quantized(N: int, C: int, M: int, format: str, group_size: int, layout: str = "contiguous", **dims: int) -> Case:
    return Case(
        "quantized_linear", {"N": N, "C": C, "M": M, **dims}, {"format": format, "group_size": group_size}, layout
    )


def _nf4(*shape: int, block_size: int = 64, dtype: torch.dtype = torch.float32, **dims: int) -> Case:
    return Case("dequantize_nf4", dims, {"shape": shape, "block_size": block_size, "dtype": dtype})


def _linear_loss(N: int, C: int, V: int, bench: bool = False, **options: Any) -> Case:
    return Case("linear_cross_entropy", {"N": N, "C": C, "V": V}, options, bench=bench, slow_reference=bench)


CASES: dict[str, list[Case]] = {
    "gelu": [
        Case("gelu", {"N": 1, "C": 1}),
        Case("gelu", {"N": 3, "C": 15}),
        Case("gelu", {"N": 7, "C": 33}, {"approximate": "none"}, "strided"),
        Case("gelu", {"N": 130, "C": 70}, {"approximate": "tanh"}),
        Case("gelu", {"N": 1, "C": 9001, "bias": 0}, {"approximate": "none"}),
        Case("gelu", {"N": 5, "C": 2049}, {"approximate": "tanh"}, "strided"),
        Case("gelu", {"N": 0, "C": 8}),
        Case("gelu", {"N": 4096, "C": 3072}, {"approximate": "tanh"}, bench=True),
    ],
    "causal_attention": [
        _attention(2, 3, 256, 64),
        _attention(1, 2, 200, 64, layout="strided"),
        _attention(1, 2, 77, 64, causal=False),
        _attention(2, 2, 129, 128, dropout_p=0.1, seed=2**63 + 5, offset=7),
        _attention(1, 2, 333, 48, layout="strided", dropout_p=0.2, seed=3),
        _attention(1, 2, 1, 64),
        _attention(1, 1, 67, 80, causal=False, dropout_p=0.3, seed=9, offset=2**32 - 1),
        _attention(2, 2, 113, 59, layout="strided", dropout_p=0.1),
        _attention(1, 1, 65, 1),
        _attention(1, 1, 70, 256),
        _attention(1, 2, 5, 64, S=200),
        _attention(2, 2, 1, 33, S=77),
        _attention(1, 2, 100, 16, S=40),
        _attention(2, 1, 150, 64, window=17),
        _attention(1, 1, 300, 32, window=64, dropout_p=0.1, seed=1),
        _attention(3, 2, 90, 64, seq_lens=torch.tensor([90, 0, 37])),
        _attention(2, 2, 70, 64, S=130, causal=False, seq_lens=torch.tensor([101, 5])),
        _attention(1, 2, 200, 64, cu_seqlens=torch.tensor([0, 13, 13, 100, 200])),
        _attention(1, 2, 150, 40, layout="strided", cu_seqlens=torch.tensor([0, 100, 140]), window=9),
        _attention(1, 2, 64, 64, softmax_scale=-0.3),
        _attention(1, 2, 64, 64, softmax_scale=0.0, dropout_p=1.0),
        _attention(0, 2, 8, 16),
        _attention(1, 2, 0, 16, S=5),
        _attention(1, 2, 3, 16, S=0),
        Case("causal_attention", {"B": 4, "H": 12, "T": 1024, "D": 64}, bench=True),
        Case(
            "causal_attention",
            {"B": 4, "H": 12, "T": 1024, "D": 64},
            {"dropout_p": 0.1},
            bench=True,
            slow_reference=True,
        ),
    ],
    "layer_norm": [
        _rows("layer_norm", 1, 1),
        _rows("layer_norm", 3, 15),
        _rows("layer_norm", 7, 33, "strided", eps=1e-3),
        _rows("layer_norm", 130, 70, bias=0),
        _rows("layer_norm", 5, 1023, fp32_weights=1),
        _rows("layer_norm", 65, 768),
        _rows("layer_norm", 0, 8),
        _rows("layer_norm", 4096, 768, bench=True),
    ],
    "add_layer_norm": [
        _rows("add_layer_norm", 1, 1),
        _rows("add_layer_norm", 3, 15, dropout_p=0.5, seed=1),
        _rows("add_layer_norm", 7, 33, "strided"),
        _rows("add_layer_norm", 130, 70, bias=0, dropout_p=0.1, seed=2**64 - 1, offset=3),
        _rows("add_layer_norm", 5, 1023, fp32_weights=1, fp32_residual=1, dropout_p=0.2),
        _rows("add_layer_norm", 9, 129, fp32_residual=1, dropout_p=1.0),
        _rows("add_layer_norm", 0, 8),
        _rows("add_layer_norm", 4096, 768, bench=True),
        _rows("add_layer_norm", 4096, 768, dropout_p=0.1, bench=True),
    ],
    "dropout": [
        _rows("dropout", 1, 1, p=0.5),
        _rows("dropout", 3, 15, p=0.0),
        _rows("dropout", 7, 33, "strided", p=0.3, seed=2**63, offset=2**32 - 1),
        _rows("dropout", 5, 1029, p=0.9),
        _rows("dropout", 4, 70, p=1.0),
        _rows("dropout", 0, 8, p=0.1),
        _rows("dropout", 4096, 768, p=0.1, bench=True),
    ],
    "cross_entropy": [
        _loss(1, 1),
        _loss(7, 15, reduction="none"),
        _loss(9, 33, "strided", reduction="sum", label_smoothing=0.1),
        _loss(6, 2049, label_smoothing=1.0, ignore_index=-1),
        _loss(5, 5003, "strided", ignore_index=3, label_smoothing=0.3, reduction="none"),
        _loss(2048, 50257, bench=True),
    ],
    "linear": [
        _linear(1, 1, 1),
        _linear(16, 15, 7),
        _linear(97, 33, 65, "strided"),
        _linear(200, 70, 1, bias=0),
        _linear(31, 513, 40, activation="gelu_tanh"),
        _linear(130, 8, 770, "strided", activation="gelu"),
        _linear(0, 8, 4),
        _linear(4096, 768, 3072, bench=True),
        _linear(4096, 3072, 768, bench=True),
    ],
    "linear_cross_entropy": [
        _linear_loss(7, 8, 15, reduction="none"),
        _linear_loss(9, 16, 33, reduction="sum", label_smoothing=0.1),
        _linear_loss(11, 24, 2049, ignore_index=3),
        _linear_loss(2048, 768, 50257, bench=True),
    ],
    "dequantize_nf4": [
        _nf4(1),
        _nf4(3, 5, block_size=16, dtype=torch.float16),
        _nf4(40, 100, double=1),
        _nf4(7, 33, 23, block_size=16, dtype=torch.float16, double=1),  # two blocks of scales
        _nf4(300, 64, block_size=4096),
        _nf4(0, 8),
    ],
    "quantized_linear": [
        _quantized(1, 1, 1, "int8", 32),
        _quantized(1, 768, 40, "int4", 32),  # decoding: the groups are split among programs
        _quantized(5, 512, 33, "nf4", 64, bias=0),
        _quantized(16, 1100, 17, "int8", 128, "strided"),
        _quantized(17, 100, 65, "int4", 32, "strided", bias=0, fp32_scales=1),
        _quantized(67, 256, 70, "nf4", 128),
        _quantized(97, 33, 130, "int8", 64, fp32_scales=1),
        _quantized(0, 64, 4, "int4", 64),
        _quantized(3, 64, 0, "int8", 32),
    ],
    "sample": [
        Case("sample", {"N": 3, "V": 15}),
        Case("sample", {"N": 8, "V": 50257}, {"temperature": 0.8, "top_p": 0.9}, bench=True),
        Case("sample", {"N": 8, "V": 50257}, {"top_k": 50}, bench=True),
        Case("sample", {"N": 8, "V": 50257}, bench=True),
    ],
}


def cases(op: str) -> list[Case]:
    """The cases that the parity tests of `op` run (those for the benchmarks alone left out)."""
    return [c for c in CASES[op] if not c.bench]


def bench_cases(op: str) -> list[Case]:
    return [c for c in CASES[op] if c.bench]


# ---- running and comparing ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """Results of one call and the gradients of its differentiable arguments."""

    outputs: list[Tensor]
    grads: list[Tensor]
    upstream: float  # largest of the gradients that were sent in: the scale of one that cancels to nothing


def _floats(values: Any) -> list[Tensor]:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def run(
    fn: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    *,
    exact: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Run:
    """Call fn on the case's inputs and differentiate all its differentiable results against random gradients.

    With exact=True the inputs, already rounded to dtype, and the upstream gradients are widened to float64 first. The
    call is made on `device`, with the same numbers; the results come back to the CPU.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    widen = (lambda t: t.double()) if exact else (lambda t: t)

    def there(t: Tensor) -> Tensor:
        """On the device, in the same layout: a copy of a view with gaps has gaps too."""
        if device == "cpu":
            return t
        base = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        return base.copy_(t) if t.numel() else base

    frozen = FROZEN.get(case.op, ())
    args = [
        a if a is None else widen(there(a)).requires_grad_(n not in frozen) if a.is_floating_point() else there(a)
        for n, a in enumerate(case.inputs(dtype, seed))
    ]
    options = {k: there(v) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    outputs = _floats(fn(*args, **options))
    differentiable = [o for o in outputs if o.requires_grad]
    upstream = [
        widen(torch.randn(o.shape, generator=generator).to(dtype)).to(o.dtype).to(device) for o in differentiable
    ]
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    grads = torch.autograd.grad(differentiable, inputs, upstream) if differentiable else ()
    largest = max((u.abs().max().item() for u in upstream if u.numel()), default=0.0)
    return Run([o.detach().cpu() for o in outputs], [g.cpu() for g in grads], largest)


def check_case(
    case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu", **extra_floor: float
) -> tuple[float, float]:
    """Three-way parity of one case: the public op (on `device`), and on the CPU the eager reference in the same dtype
    and the reference in float64.

    Returns:
        The error of the results, and of the gradients, as a multiple of eager PyTorch's (plus rounding).
    """
    ours = run(getattr(ops, case.op), case, dtype, seed=seed, device=device)
    eager = run(getattr(reference, case.op), case, dtype, seed=seed)
    exact = run(getattr(reference, case.op), case, dtype, exact=True, seed=seed)
    label = f"{case.op} {case.id} {dtype}"
    results = assert_accurate(ours.outputs, eager.outputs, exact.outputs, 2, f"{label} result", dtype, **extra_floor)
    least = exact.upstream
    grads = assert_accurate(ours.grads, eager.grads, exact.grads, 3, f"{label} gradient", dtype, least, **extra_floor)
    return results, grads


def assert_accurate(
    ours: list[Tensor],
    eager: list[Tensor],
    exact: list[Tensor],
    factor: float,
    label: str,
    dtype: torch.dtype,
    least: float = 0.0,
    floor: float = 0.0,
) -> float:
    """Raise AssertionError unless |ours - exact| <= factor * |eager - exact| + floors, and the same places are finite.

    Args:
        ours, eager, exact: results, one tensor each per place; exact in float64.
        factor: how much worse than eager PyTorch is allowed.
        label: begins the message.
        dtype: of the inputs; its precision sets the floor of FLOOR units in the last place.
        least: the scale of those units is at least this.
        floor: a further relative floor, for a stated and measured reason.
    Returns:
        The largest |ours - exact| / (|eager - exact| + one unit in the last place).
    """
    worst = 0.0
    scale = max((_finite(x).abs().max().item() for x in exact if _finite(x).numel()), default=0.0)
    scale = max(scale, least)
    for n, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert a.shape == x.shape, f"{label} {n}: shape {tuple(a.shape)}, expected {tuple(x.shape)}"
        same = torch.equal(a.isfinite(), x.isfinite()) and torch.equal(a[~x.isfinite()].double(), x[~x.isfinite()])
        assert same or x.isnan().any(), f"{label} {n}: other places are finite than in the reference"
        where = x.isfinite()
        if not where.any():
            continue
        error, theirs = ((t.double() - x)[where].abs().max().item() for t in (a, e))
        eps = torch.finfo(dtype if a.dtype == dtype else torch.float32).eps
        limit = factor * theirs + (FLOOR * eps + floor) * scale
        worst = max(worst, error / (theirs + eps * scale) if scale else 0.0)
        assert error <= limit, f"{label} {n}: error {error:.3g}, eager {theirs:.3g}, limit {limit:.3g}"
    return worst


def _finite(x: Tensor) -> Tensor:
    return x[x.isfinite()]


def dtypes() -> list[Any]:
    """pytest parameters over the kernels' dtypes."""
    import pytest

    return [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]
