"""Ours beside the peers on the case table: A B A B in one run, medians of the ratios, correctness asserted first."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import CASES, Case, check_case

Fn = Callable[..., Any]
COPY = "copy of its bytes"  # not a peer: the floor of what only moves memory


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


def _gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float = 0.0, **o: Any):
    total = F.dropout(x, dropout_p) + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias), total


def _dropout(x: Tensor, p: float = 0.0, **options: Any) -> Tensor:
    return F.dropout(x, p)


def _cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits, targets, **options)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, **options)


def _sample(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, **options: Any) -> Tensor:
    """Temperature, top-k, top-p and a draw, the way it is written everywhere: a sort of the vocabulary."""
    scaled = logits.float() / temperature
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        values, order = scaled.sort(descending=True)
        probs = values.softmax(-1)
        dropped = probs.cumsum(-1) - probs >= top_p
        scaled = scaled.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return torch.multinomial(scaled.softmax(-1), 1)[:, 0]


TORCH: dict[str, tuple[str, Fn]] = {
    "causal_attention": ("SDPA", _sdpa),
    "gelu": ("F.gelu", _gelu),
    "layer_norm": ("F.layer_norm", _layer_norm),
    "add_layer_norm": ("F.layer_norm of the sum", _add_layer_norm),
    "dropout": ("F.dropout", _dropout),
    "cross_entropy": ("F.cross_entropy", _cross_entropy),
    "linear": ("F.linear", _linear),
    "linear_cross_entropy": ("F.linear + F.cross_entropy", _linear_cross_entropy),
    "sample": ("sort + multinomial", _sample),
}


@dataclass
class Comparison:
    """One case in one dtype and mode, ours and the peers as closures that take no arguments."""

    case: Case
    dtype: torch.dtype
    backward: bool
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any]]
    errors: tuple[float, float] = (0.0, 0.0)  # of results and gradients, as multiples of eager PyTorch's; small cases
    milliseconds: dict[str, float] = field(default_factory=dict)  # medians; "ours" first
    ratios: dict[str, float] = field(default_factory=dict)  # peer / ours, median over the rounds

    @property
    def name(self) -> str:
        mode = "fwd+bwd" if self.backward else "fwd"
        return f"{self.case.op} {self.case.id} {str(self.dtype)[6:]} {mode}"


def _closure(fn: Fn, case: Case, dtype: torch.dtype, backward: bool) -> Callable[[], Any]:
    """A call of fn on inputs made now; with backward, gradients of its first result too."""
    args = [a.requires_grad_(backward) if a is not None and a.is_floating_point() else a for a in case.inputs(dtype)]
    wanted = [a for a in args if a is not None and a.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return fn(*args, **case.options)

    if not backward:
        return forward
    out = fn(*args, **case.options)
    first = out[0] if isinstance(out, tuple) else out
    upstream = torch.ones_like(first)

    def both() -> Any:
        out = fn(*args, **case.options)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, wanted, upstream, allow_unused=True)

    return both


def comparisons(op_names: list[str] | None = None, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)):
    """Yield a ready Comparison for every benchmark case: parity is checked on the small cases of the op first."""
    for op in op_names or list(CASES):
        for dtype in dtypes:
            checked = [check_case(case, dtype) for case in CASES[op] if not case.bench]
            errors = max(e[0] for e in checked), max(e[1] for e in checked)
            for case in (c for c in CASES[op] if c.bench):
                for backward in (False, True) if op != "sample" else (False,):
                    comparison = make_comparison(case, dtype, backward)
                    comparison.errors = errors
                    yield comparison


def make_comparison(case: Case, dtype: torch.dtype, backward: bool) -> Comparison:
    label, torch_fn = TORCH[case.op]
    peers = {label: _closure(torch_fn, case, dtype, backward)}
    flops, data = case.cost(torch.finfo(dtype).bits // 8)
    if not flops and not backward:
        peers[COPY] = _copy(int(data))
    if not case.slow_reference:
        peers["eager"] = _closure(getattr(reference, case.op), case, dtype, backward)
    ours = _closure(getattr(ops, case.op), case, dtype, backward)
    return Comparison(case, dtype, backward, ours, peers)


def _copy(size: int) -> Callable[[], Any]:
    """Reads and writes `size` bytes in all, into memory that is there already: what a memory-bound op can reach."""
    source, target = torch.zeros(2, size // 2, dtype=torch.uint8).unbind()
    return lambda: target.copy_(source)


def _timed(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def compare(c: Comparison, rounds: int = 7, seconds: float = 4.0) -> Comparison:
    """Fill in times and ratios: all take turns, so that a drifting machine drifts under all alike, and in an order that
    changes from round to round, as whoever follows eager PyTorch finds nothing in the caches.

    Args:
        rounds: at most so many rounds after one warm-up round.
        seconds: stop early (after three rounds) when this much time is spent.
    """
    runners = {"ours": c.ours, **c.peers}
    for fn in runners.values():
        fn()
    times: dict[str, list[float]] = {name: [] for name in runners}
    start = time.perf_counter()
    for n in range(rounds):
        for name in random.Random(n).sample(list(runners), len(runners)):
            times[name].append(_timed(runners[name]))
        if n >= 2 and time.perf_counter() - start > seconds:
            break
    record(c, times)
    return c


def record(c: Comparison, times: dict[str, list[float]]) -> None:
    """Medians of the times, and of the ratios round by round, into `c`."""
    c.milliseconds = {name: statistics.median(values) for name, values in times.items()}
    ours = times["ours"]
    for name, values in times.items():
        if name != "ours":
            c.ratios[name] = statistics.median(t / o for t, o in zip(values, ours, strict=True))
