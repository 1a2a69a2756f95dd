"""Running a case, and comparing the op with the eager reference by the accuracy rule.

Results get factor 2 and gradients 3: the tolerance is what PyTorch itself achieves on the same input, not a number chosen by
hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing.accuracy import assert_accurate
from gptfast.testing.case import SPECS, Case


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

    With `widen` the inputs, already rounded to dtype, and the upstream gradients are converted to that dtype first, and so is
    the option `out_dtype`. The call is made on `device`, with the same numbers; the results are copied back to the CPU.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    wide = (lambda t: t) if widen is None else (lambda t: t.to(widen))

    def there(t: Tensor) -> Tensor:
        """On the device, in the same layout: a copy of a view with gaps has gaps too."""
        if device == "cpu":
            return t
        base = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        return base.copy_(t) if t.numel() else base

    constant = SPECS[case.op].non_differentiable
    args = [
        a if a is None else wide(there(a)).requires_grad_(n not in constant) if a.is_floating_point() else there(a)
        for n, a in enumerate(case.inputs(dtype, seed))
    ]
    options = {k: there(v) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    incoming = options.get("out_dtype", dtype)  # what the gradients are rounded to, in each of the calls
    if widen is not None and "out_dtype" in options:
        options["out_dtype"] = widen
    outputs = _floats(fn(*args, **options))
    differentiable = [o for o in outputs if o.requires_grad]
    upstream = [
        wide(torch.randn(o.shape, generator=generator).to(dtype).to(incoming)).to(o.dtype).to(device)
        for o in differentiable
    ]
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    grads = torch.autograd.grad(differentiable, inputs, upstream) if differentiable else ()
    largest = max((u.abs().max().item() for u in upstream if u.numel()), default=0.0)
    return Run([o.detach().cpu() for o in outputs], [g.cpu() for g in grads], largest)


def check_case(
    case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu", floors: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float]:
    """Parity of one case: the public op (on `device`), and on the CPU the eager reference in the same dtype, in float32
    and in float64.

    Args:
        floors: for results and gradients, beside those of the op: see `assert_accurate`.
    Returns:
        The error of the results, and of the gradients, as a multiple of eager PyTorch's (plus rounding).
    """
    eager_op = getattr(reference, case.op)
    ours = run(getattr(ops, case.op), case, dtype, seed=seed, device=device)
    eager = run(eager_op, case, dtype, seed=seed)
    rounds = dtype != torch.float32 or "out_dtype" in case.options
    fine = run(eager_op, case, dtype, widen=torch.float32, seed=seed) if rounds else eager
    exact = run(eager_op, case, dtype, widen=torch.float64, seed=seed)
    label = f"{case.op} {case.id} {dtype}"
    of_op = SPECS[case.op].floors.get(dtype, (0.0, 0.0))
    for_results, for_grads = (own + more for own, more in zip(of_op, floors, strict=True))
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
