"""The accuracy rule that tests and benchmarks hold results to, a tensor and an element at a time (`assert_accurate`).

An element may miss the exact value (the same op in float64) by

    half a unit in the last place of this value            where the result is bfloat16 or float16: the last rounding
    + factor x eager's error                               largest of the tensor, beyond its own last rounding
    + ULP_FLOOR fp32 units of the largest value of the row     sums whose terms cancel; `least` where the terms are known
    + floor x eps of the dtype x that value                stated and measured, if a kernel computes in less precision

Eager PyTorch's error is taken in the same dtype, and in float32 on the same numbers. What a kernel rounds to half
precision must thus be as exact as PyTorch in float32 before the rounding. And the rounding must not be biased:
the mean of the signed differences from the exact value, itself rounded, is 0 but for chance (`_assert_no_drift`).
"""

from __future__ import annotations

import torch
from torch import Tensor

ULP_FLOOR = 4  # fp32 units in the last place
MAX_BIAS = 0.02  # of a mean, in units in the last place; truncation has 0.5, ties away from 0 up to 0.06
MIN_ELEMENTS = 256  # of a mean
SHORT_ROW = 16  # the largest of fewer values says little about the terms of their sums


def assert_accurate(
    ours: list[Tensor],
    eager: list[Tensor],
    exact: list[Tensor],
    factor: float,
    label: str,
    *,
    fine: list[Tensor] | None = None,
    least: float = 0.0,
    floor: float = 0.0,
) -> float:
    """Raise AssertionError where a result breaks the rule above, or other places are finite than in the reference.

    Args:
        ours, eager, exact: results, one tensor each per place; exact in float64.
        factor: how much worse than eager PyTorch is allowed.
        label: begins the message.
        fine: eager's results in float32 on the same numbers; None where `eager` is that.
        least: the scale of the units of a sum is at least this.
        floor: a further floor, in eps of the result's dtype, for a stated and measured reason.
    Returns:
        The largest |ours - exact| / (|eager - exact| + one unit in the last place).
    """
    worst = 0.0
    for n, (a, e, f, x) in enumerate(zip(ours, eager, eager if fine is None else fine, exact, strict=True)):
        name = f"{label} {n}"
        assert a.shape == x.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(x.shape)}"
        same = torch.equal(a.isfinite(), x.isfinite()) and torch.equal(a[~x.isfinite()].double(), x[~x.isfinite()])
        assert same or x.isnan().any(), f"{name}: other places are finite than in the reference"
        where = x.isfinite()
        if not where.any():
            continue
        error, theirs, theirs_fine = ((t.double() - x).abs().where(where, 0.0) for t in (a, e, f))
        half = rounding(x, a.dtype)
        beyond = max((theirs - half).max().item(), theirs_fine.max().item(), 0.0)
        scale = _row_scale(x, where, least)
        sums = factor * beyond + (ULP_FLOOR * torch.finfo(torch.float32).eps + floor * torch.finfo(a.dtype).eps) * scale
        _assert_within(name, error, half + sums, theirs)
        if a.dtype in (torch.bfloat16, torch.float16):
            _assert_no_drift(name, a, x, where, torch.maximum(2 * half, sums))
        unit = torch.finfo(a.dtype).eps * scale.max().item()
        worst = max(worst, error.max().item() / (theirs.max().item() + unit) if unit else 0.0)
    return worst


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of every value, in a dtype of 16 bits; 0 for others, whose sums decide."""
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.zeros_like(x)
    info = torch.finfo(dtype)
    x = x.where(x.isfinite(), 0.0)
    unit = torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1)
    return unit.clamp(min=info.smallest_normal * info.eps) / 2


def _row_scale(x: Tensor, where: Tensor, least: float) -> Tensor:
    """The largest value of each row, at least `least`."""
    size = x.abs().where(where, 0.0)
    rows = size.amax(-1, keepdim=True) if x.dim() > 1 and x.shape[-1] >= SHORT_ROW else size.max()
    return rows.clamp(min=least)


def _assert_within(name: str, error: Tensor, limit: Tensor, theirs: Tensor) -> None:
    if (error <= limit).all():
        return
    n = int((error - limit).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(n, device="cpu"), error.shape))
    limits = limit.expand(error.shape)
    raise AssertionError(
        f"{name}: error {error[at].item():.3g} at {at}, limit {limits[at].item():.3g}; eager there {theirs[at].item():.3g}, "
        f"at most {theirs.max().item():.3g}; {int((error > limits).sum())} of {error.numel()} are beyond"
    )


def _assert_no_drift(name: str, a: Tensor, x: Tensor, where: Tensor, unit: Tensor) -> None:
    """The mean of (ours - round(exact)) in units, counted away from 0, within MAX_BIAS and five standard errors."""
    counted = where & (x != 0)
    if counted.sum() < MIN_ELEMENTS:
        return
    signed = (((a.double() - x.to(a.dtype).double()) * x.sign()) / unit)[counted]
    mean, chance = signed.mean().abs().item(), (signed.std() / len(signed) ** 0.5).item()
    assert mean <= MAX_BIAS + 5 * chance, (
        f"{name}: rounds to one side, {mean:.3g} units on average; chance is {chance:.2g}"
    )
