"""One case table per op, shared by the tests and the benchmarks.

Every case is held to the rule of gptfast/accuracy.py, with factor 2 for results and 3 for gradients: the tolerance is what
PyTorch itself achieves on the same input, not a number chosen by hand. Where a kernel computes with less on purpose,
`STATED` says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.accuracy import assert_accurate
from gptfast.ops import reference

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
    spread = c.dims.get("scores", 1) ** 0.5  # of the scores, some 4 times that at most
    return tuple((torch.randn(B, H, n, D, generator=g) * f).to(dtype) for n, f in ((T, spread), (S, spread), (S, 1)))


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
    B: int,
    H: int,
    T: int,
    D: int,
    S: int | None = None,
    layout: str = "contiguous",
    **options: Any,
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
        Case("gelu", {"N": 1, "C": 1}, {"approximate": "tanh"}),
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
        _attention(1, 2, 150, 40, layout="strided", cu_seqlens=torch.tensor([0, 100, 150]), window=9),
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
        _linear(33, 70, 65, "strided", activation="relu"),
        _linear(31, 40, 130, activation="silu"),
        _linear(31, 40, 130, activation="quick_gelu"),
        _linear(31, 40, 130, activation="tanh"),
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


# Floors of results and of gradients, in eps of the dtype times the largest value of the row (gptfast/accuracy.py). The
# comments have the largest that was needed on any ISA and on the emulated CUDA kernels, over five seeds.
STATED: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    ("gelu", torch.bfloat16): (0.05, 0.03),  # 0.030, 0.016: an approximate reciprocal on AVX2
    ("linear_cross_entropy", torch.bfloat16): (0.0, 0.1),  # 0.037: logits and their gradient are stored, as eager does
    ("linear_cross_entropy", torch.float16): (0.0, 0.1),  # 0.003
    ("causal_attention", torch.bfloat16): (0.8, 1.1),  # 0.53, 0.71: probabilities and dS are multiplied as bf16
    ("causal_attention", torch.float16): (0.8, 1.1),  # 0.51, 0.63: the same; on the CPU the stored result alone
    # 0.26, 0.30 in Triton's interpreter: weights are rounded to the dtype that is multiplied. Not measured with bf16.
    ("quantized_linear", torch.float16): (0.5, 0.5),
    ("quantized_linear", torch.bfloat16): (0.5, 0.5),
}


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
    widen: torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Run:
    """Call fn on the case's inputs and differentiate all its differentiable results against random gradients.

    With `widen` the inputs, already rounded to dtype, and the upstream gradients are brought to that dtype first. The
    call is made on `device`, with the same numbers; the results come back to the CPU.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    wide = (lambda t: t) if widen is None else (lambda t: t.to(widen))

    def there(t: Tensor) -> Tensor:
        """On the device, in the same layout: a copy of a view with gaps has gaps too."""
        if device == "cpu":
            return t
        base = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        return base.copy_(t) if t.numel() else base

    frozen = FROZEN.get(case.op, ())
    args = [
        a if a is None else wide(there(a)).requires_grad_(n not in frozen) if a.is_floating_point() else there(a)
        for n, a in enumerate(case.inputs(dtype, seed))
    ]
    options = {k: there(v) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    outputs = _floats(fn(*args, **options))
    differentiable = [o for o in outputs if o.requires_grad]
    upstream = [
        wide(torch.randn(o.shape, generator=generator).to(dtype)).to(o.dtype).to(device) for o in differentiable
    ]
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    grads = torch.autograd.grad(differentiable, inputs, upstream) if differentiable else ()
    largest = max((u.abs().max().item() for u in upstream if u.numel()), default=0.0)
    return Run([o.detach().cpu() for o in outputs], [g.cpu() for g in grads], largest)


def check_case(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[float, float]:
    """Parity of one case: the public op (on `device`), and on the CPU the eager reference in the same dtype, in float32
    and in float64.

    Returns:
        The error of the results, and of the gradients, as a multiple of eager PyTorch's (plus rounding).
    """
    eager_op = getattr(reference, case.op)
    ours = run(getattr(ops, case.op), case, dtype, seed=seed, device=device)
    eager = run(eager_op, case, dtype, seed=seed)
    fine = eager if dtype == torch.float32 else run(eager_op, case, dtype, widen=torch.float32, seed=seed)
    exact = run(eager_op, case, dtype, widen=torch.float64, seed=seed)
    label = f"{case.op} {case.id} {dtype}"
    for_results, for_grads = STATED.get((case.op, dtype), (0.0, 0.0))
    results = assert_accurate(
        ours.outputs, eager.outputs, exact.outputs, 2, f"{label} result", fine=fine.outputs, floor=for_results
    )
    grads = assert_accurate(
        *(ours.grads, eager.grads, exact.grads, 3, f"{label} gradient"),
        fine=fine.grads,
        least=exact.upstream,
        floor=for_grads,
    )
    return results, grads


def dtypes() -> list[Any]:
    """pytest parameters over the kernels' dtypes."""
    import pytest

    return [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]
