"""The accuracy rule refuses what a tolerance on the largest value lets through, and passes what rounds once."""

from __future__ import annotations

import pytest
import torch

from gptfast.testing.accuracy import assert_accurate

HALVES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
X = torch.randn(40, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check(ours: list[torch.Tensor], exact: list[torch.Tensor], **options) -> None:
    dtype = ours[0].dtype
    assert_accurate(ours, [x.to(dtype) for x in exact], exact, 2, "op", fine=[x.float() for x in exact], **options)


def cut(x: torch.Tensor, dtype: torch.dtype, ties: bool = False) -> torch.Tensor:
    """Positive or negative values rounded towards 0, or away from it in ties alone."""
    unit = torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps), torch.frexp(x).exponent - 1)
    steps = x.abs() / unit
    return ((steps + 0.5 if ties else steps).floor() * unit * x.sign()).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_one_rounding_passes(dtype):
    check([X.to(dtype), (X[0] * 1e-3).to(dtype)], [X, X[0] * 1e-3])
    check([(X.float() * (1 + 1e-7)).to(dtype)], [X])


@pytest.mark.parametrize("dtype", HALVES)
def test_truncation_is_refused(dtype):
    with pytest.raises(AssertionError, match=r"op 0: error .* at \(\d+, \d+\), limit"):
        check([cut(X, dtype)], [X])


@pytest.mark.parametrize("dtype", HALVES)
def test_ties_away_from_0_are_refused(dtype):
    """Half a unit is the limit, and half a unit it is: only the mean shows it, where a tenth of the values are ties."""
    halves = X.to(dtype).double()
    unit = torch.ldexp(torch.full_like(X, torch.finfo(dtype).eps), torch.frexp(halves).exponent - 1)
    ties = torch.where(torch.arange(100) % 10 == 0, halves + unit / 2, X)
    check([ties.to(dtype)], [ties])
    with pytest.raises(AssertionError, match=r"op 0: rounds to one side, 0\.0\d+ units on average"):
        check([cut(ties, dtype, ties=True)], [ties])


@pytest.mark.parametrize("dtype", HALVES)
def test_small_values_are_judged_by_themselves(dtype):
    """Beside another tensor of the call, and beside another row, a thousand times as large."""
    small = X * 1e-3
    wrong = small.clone()
    wrong[3, 5] *= 1 + 3 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"op 1: error"):
        check([X.to(dtype), wrong.to(dtype)], [X, small])
    with pytest.raises(AssertionError, match=r"op 0: error .* at \(43, 5\)"):
        check([torch.cat([X, wrong]).to(dtype)], [torch.cat([X, small])])


def test_a_stated_floor_and_eager_errors_count():
    wrong = (X.float() + 1e-3).double()
    with pytest.raises(AssertionError, match="4000 of 4000 are beyond"):
        check([wrong.float()], [X])
    check([wrong.float()], [X], floor=1e-2 / torch.finfo(torch.float32).eps)
    assert_accurate([wrong.float()], [(X + 6e-4).float()], [X], 2, "op")


def test_other_places_that_are_finite():
    bad = X.float()
    bad[0, 0] = float("inf")
    with pytest.raises(AssertionError, match="other places are finite"):
        check([bad], [X])
