"""The ops of a model at its shape: which backend runs each and why, errors against float64, speed beside torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from gptfast.backend import AUTOMATIC, KERNEL_DTYPES, chosen, cpu_isa, resolve, unavailable_reason
from gptfast.benchmarking.compare import compare, make_comparison
from gptfast.config import GPTConfig
from gptfast.ops.gemm import default_for
from gptfast.testing import SPECS, Case, check_case

WITHOUT_TEST = ("embedding", "sample")  # have no peer in torch, or nothing to differentiate
MOST_FLOPS, MOST_BYTES = 2e9, 64e6  # of a timed forward call: a tenth of a second on a small machine
_ROWS_OF_CHECK = 32  # against float64, which takes long


@dataclass
class OpResult:
    """What was found of one op. None: not measured."""

    op: str
    dtype: str
    backend: str
    reason: str  # why this backend
    shape: str | None = None  # that was timed
    results: float | None = None  # error against float64, as a multiple of eager PyTorch's
    gradients: float | None = None
    wrong: str | None = None  # which result broke the accuracy rule
    milliseconds: float | None = None  # forward and backward
    peer: str | None = None  # torch's own function
    ratio: float | None = None  # its time / ours


def choice(op: str, dtype: torch.dtype, device: str) -> tuple[str, str]:
    """The backend that runs `op` on tensors of this dtype and device, and why."""
    try:
        name = resolve(op, None, torch.empty(0, dtype=dtype, device=device))
    except (RuntimeError, ValueError, TypeError) as error:
        return "none", str(error)
    if name == "eager":
        return name, _why_eager(op, dtype, device)
    why = f"kernels for {cpu_isa()}" if name == "cpu" else "the first backend that has it here"
    if chosen() == name:
        why += ", asked for"
    if name == "cpu" and "linear" in op:
        why += f"; products by {'its own kernel' if default_for(dtype) == 'own' else 'torch'}"
    return name, why


def _why_eager(op: str, dtype: torch.dtype, device: str) -> str:
    if chosen() == "eager":
        return "asked for"
    if dtype not in KERNEL_DTYPES:
        return f"kernels compute float32, bfloat16 and float16, not {str(dtype)[6:]}"
    told = [f"{name}: {unavailable_reason(name) or 'no kernel for it'}" for name in AUTOMATIC.get(device, ())]
    return "; ".join(told) or f"no backend for {device}"


def model_cases(config: GPTConfig, batch_size: int, seq_len: int) -> list[Case]:
    """A case for each op that a forward and backward of the model calls."""
    rows = {"N": batch_size * seq_len, "C": config.n_embd}
    attention = {"B": batch_size, "H": config.n_head, "T": seq_len, "D": config.head_dim}
    window = next((w for w in map(config.window_of, range(config.n_layer)) if w), None)
    cases = [
        Case("layer_norm", rows),
        Case("add_layer_norm", rows),
        Case("linear", {**rows, "M": config.inner_dim, "bias": int(config.bias)}),
        Case("causal_attention", attention),
        Case("linear_cross_entropy", {**rows, "V": config.vocab_size}),
    ]
    if window:
        cases.insert(4, Case("causal_attention", attention, {"window": window}))
    if config.activation.startswith("gelu"):
        approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        cases.append(Case("gelu", {"N": rows["N"], "C": config.inner_dim}, {"approximate": approximate}))
    if config.resid_pdrop:
        cases.append(Case("dropout", rows, {"p": config.resid_pdrop}))
    return cases


def self_test(
    config: GPTConfig, batch_size: int, seq_len: int, dtype: torch.dtype, device: str = "cpu", seconds: float = 20.0
) -> list[OpResult]:
    """Check every op of a model against float64, then time it beside torch's own function.

    Sizes that would take too long are cut: fewer rows or sequences, channels as they are. What `seconds` do not suffice
    for stays None, the times first. 0: backends and reasons only. GPUs are checked and not timed.
    """
    end = time.monotonic() + seconds
    cases = model_cases(config, batch_size, seq_len)
    results = [OpResult(case.op, str(dtype)[6:], *choice(case.op, dtype, device)) for case in cases]
    for case, result in zip(cases, results, strict=True):
        if time.monotonic() < end and result.backend != "none":
            _check(result, cut(case, _ROWS_OF_CHECK), dtype, device)
    for n, (case, result) in enumerate(zip(cases, results, strict=True)):
        left = end - time.monotonic()
        if left > 0 and result.backend != "none" and device == "cpu":
            _time(result, case, dtype, left / (len(cases) - n))
    return results + [OpResult(op, str(dtype)[6:], *choice(op, dtype, device)) for op in WITHOUT_TEST]


def _check(result: OpResult, case: Case, dtype: torch.dtype, device: str) -> None:
    try:
        result.results, result.gradients = check_case(case, dtype, device=device)
    except AssertionError as error:
        result.wrong = str(error)


def _time(result: OpResult, case: Case, dtype: torch.dtype, seconds: float) -> None:
    case = cheap(case, torch.finfo(dtype).bits // 8)
    result.shape = case.id
    comparison = compare(make_comparison(case, dtype, backward=True), seconds=seconds)
    result.milliseconds = comparison.milliseconds["ours"]
    result.peer, result.ratio = next(iter(comparison.ratios.items()))


def cut(case: Case, rows: int) -> Case:
    """The case cut to at most this many rows and classes; attention to one sequence, two heads, four times as many positions."""
    most = {"N": rows, "V": 64 * rows, "B": 1, "H": 2, "T": 4 * rows}
    return replace(case, dims={k: min(v, most.get(k, v)) for k, v in case.dims.items()}, options=dict(case.options))


def cheap(case: Case, element_size: int) -> Case:
    """The case, with fewer classes, rows or sequences where a call would do more than MOST_FLOPS or move more than MOST_BYTES."""
    case = replace(case, slow_reference=True, options=dict(case.options))  # eager's formula is not timed
    for name in ("V", "N", "B", "H", "T"):
        flops, data = case.cost(element_size)
        excess = max(flops / MOST_FLOPS, data / MOST_BYTES)
        if excess > 1 and name in case.dims:
            case = replace(case, dims={**case.dims, name: max(1, int(case.dims[name] / excess))})
    return case


def untimed(results: list[OpResult]) -> list[str]:
    """The ops for which there was no time."""
    return [r.op for r in results if r.op in SPECS and r.op not in WITHOUT_TEST and r.ratio is None and not r.wrong]
