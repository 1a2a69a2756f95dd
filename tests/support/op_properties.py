"""Properties that every op must have, as functions that each op's test file calls."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops
from gptfast.testing import SPECS, Case, run


def bitwise(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit that matters: values, and nan in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def check_repeatable(case: Case, dtype: torch.dtype, thread_counts: tuple[int, ...] = (1, 2, 3, 3)) -> None:
    """Runs on these numbers of threads give the same bits in results and gradients."""
    runs = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        runs.append(run(getattr(ops, case.op), case, dtype))
    for other in runs[1:]:
        for a, b in zip(runs[0].outputs + runs[0].grads, other.outputs + other.grads, strict=True):
            assert bitwise(a, b), f"{case.op} {case.id}: differs between runs or thread counts"


def check_pure(case: Case, dtype: torch.dtype) -> None:
    """Inputs stay as they are, and a second backward through the same graph gives the same gradients."""
    args = case.inputs(dtype)
    before = [None if a is None else a.clone() for a in args]
    constant = SPECS[case.op].non_differentiable
    leaves = [
        a.requires_grad_() if a is not None and a.is_floating_point() and n not in constant else a
        for n, a in enumerate(args)
    ]
    out = getattr(ops, case.op)(*leaves, **case.options)
    first = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn(first.shape).to(first.dtype)
    kept = upstream.clone()
    wanted = [a for a in leaves if a is not None and a.requires_grad]
    grads = [torch.autograd.grad(first, wanted, upstream, retain_graph=True, allow_unused=True) for _ in range(2)]
    for a, b in zip(*grads, strict=True):
        assert a is b is None or bitwise(a, b), f"{case.op} {case.id}: second backward differs"
    assert torch.equal(upstream, kept), f"{case.op} {case.id}: wrote into the incoming gradient"
    for a, b in zip(args, before, strict=True):
        assert a is None or bitwise(a.detach(), b), f"{case.op} {case.id}: wrote into an input"


def check_compiles(fn, *args: torch.Tensor) -> None:
    """torch.compile(fullgraph=True) of fn equals eager in results and gradients. fn returns one tensor."""
    torch._dynamo.reset()

    def results(f) -> list[torch.Tensor]:
        leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
        out = f(*leaves)
        wanted = [a for a in leaves if a.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    for a, b in zip(results(fn), results(torch.compile(fn, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_no_double_backward(fn, x: torch.Tensor, match: str) -> None:
    x = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=match):
        g.sum().backward()
