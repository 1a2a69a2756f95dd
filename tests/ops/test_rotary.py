"""rotary: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops
from gptfast.testing import cases, check_case, dtypes
from tests.support.op_properties import bitwise, check_compiles, check_pure, check_repeatable

CASES = cases("rotary")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """By complex numbers, in float64: another way to the same."""
    half = cos.shape[1]
    pairs = x.double()[..., : 2 * half]
    a, b = pairs.chunk(2, -1) if layout == "neox" else (pairs[..., ::2], pairs[..., 1::2])
    z = torch.complex(a, b) * torch.complex(cos.double(), sin.double())
    parts = (z.real, z.imag)
    y = torch.cat(parts, -1) if layout == "neox" else torch.stack(parts, -1).flatten(-2)
    return torch.cat([y, x.double()[..., 2 * half :]], -1)


@pytest.mark.parametrize("layout", ["neox", "interleaved"])
@pytest.mark.parametrize("half", range(1, 35))
def test_every_number_of_pairs(half, layout, isa):
    """And every misalignment of a 16-byte line, with and without channels that are not rotated."""
    cos, sin = ops.rotary_tables(3, 2 * half, 100.0)
    for more in range(4):
        x = torch.randn(1, 2, 3, 2 * half + more)
        torch.testing.assert_close(
            ops.rotary(x, cos, sin, layout=layout), turned(x, cos, sin, layout).float(), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("layout", ["neox", "interleaved"])
def test_the_gradient_is_the_inverse_rotation(layout, isa):
    """So a rotation of the gradient of a rotation gives back what came in."""
    x, (cos, sin) = torch.randn(2, 3, 5, 40, requires_grad=True), ops.rotary_tables(5, 32)
    y, dy = ops.rotary(x, cos, sin, layout=layout), torch.randn(2, 3, 5, 40)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(ops.rotary(dx, cos, sin, layout=layout), dy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.detach().norm(dim=-1), y.detach().norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("positions", [None, torch.tensor([2, 0, 4]), torch.tensor([[4, 4, 1], [0, 1, 2]])])
def test_positions_and_views_to_the_bit(positions, isa):
    """A token has the same bits wherever it lies in memory and whatever else is in the batch."""
    cos, sin = ops.rotary_tables(5, 24)
    qkv = torch.randn(2, 3, 3, 4, 24)  # (B, T, 3, H, D)
    x = qkv[:, :, 1].transpose(1, 2)
    whole = ops.rotary(x, cos, sin, positions=positions)
    assert torch.equal(ops.rotary(x.contiguous(), cos, sin, positions=positions), whole)
    assert torch.equal(ops.rotary(x.mT.contiguous().mT, cos, sin, positions=positions), whole)
    places = torch.arange(3) if positions is None else positions
    for b in range(2):
        for t in range(3):
            row = int(places[t] if places.dim() == 1 else places[b, t])
            one = ops.rotary(x[b : b + 1, :, t : t + 1], cos[row:], sin[row:])
            assert torch.equal(one[0, :, 0], whole[b, :, t])


def test_a_position_outside_the_tables_is_nan_on_a_gpu(emu):
    """It is not looked at before the launch; what is not rotated is copied."""
    x, (cos, sin) = torch.randn(1, 2, 4, 10), ops.rotary_tables(5, 8)
    for layout in ("neox", "interleaved"):
        y = ops.rotary(x, cos, sin, positions=torch.tensor([4, 5, -1, 2**40]), layout=layout)
        assert y[:, :, 1:, :8].isnan().all() and torch.equal(y[..., 8:], x[..., 8:])
        assert torch.equal(y[:, :, :1], ops.rotary(x[:, :, :1], cos[4:], sin[4:], layout=layout))


def test_transformers():
    """Their function and ours: in float32 to a rounding; in bfloat16 theirs rounds the tables first."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    q, k, (cos, sin) = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32), ops.rotary_tables(9, 32)
    doubled = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    for theirs in (
        llama.apply_rotary_pos_emb(q, k, *doubled),
        gpt_oss.apply_rotary_pos_emb(q, k, cos[None], sin[None]),
    ):
        for x, y in zip((q, k), theirs, strict=True):
            torch.testing.assert_close(ops.rotary(x, cos, sin), y, rtol=1e-6, atol=1e-6)
    theirs = gptj.apply_rotary_pos_emb(q.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)
    torch.testing.assert_close(ops.rotary(q, cos, sin, layout="interleaved"), theirs, rtol=1e-6, atol=1e-6)


def test_differentiable_twice():
    x, (cos, sin) = torch.randn(1, 2, 3, 8, requires_grad=True), ops.rotary_tables(3, 8)
    (dx,) = torch.autograd.grad(ops.rotary(x, cos, sin).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    torch.testing.assert_close(second, 8 * x.detach(), rtol=1e-5, atol=1e-5)  # a rotation keeps lengths


def test_compiles():
    x, (cos, sin) = torch.randn(2, 3, 4, 10), ops.rotary_tables(5, 6)
    check_compiles(lambda x: ops.rotary(x, cos, sin) * 2, x)
    check_compiles(lambda x: ops.rotary(x.mT.mT, cos, sin, positions=PLACES, layout="interleaved") * 2, x)


def test_repeatable(threads):
    for case in CASES:
        check_repeatable(case, torch.float32)


def test_pure():
    for case in CASES:
        check_pure(case, torch.bfloat16)


def test_fp64_passes_gradcheck():
    x, (cos, sin) = torch.randn(1, 2, 3, 9, dtype=torch.float64, requires_grad=True), ops.rotary_tables(3, 6)
    for layout in ("neox", "interleaved"):
        torch.autograd.gradcheck(lambda x, o=layout: ops.rotary(x, cos, sin, layout=o), (x,))


def test_tables_get_no_gradient():
    x, cos, sin = torch.randn(1, 1, 3, 8), *(t.requires_grad_() for t in ops.rotary_tables(3, 8))
    assert not ops.rotary(x, cos, sin).requires_grad
    assert ops.rotary(x.requires_grad_(), cos, sin).requires_grad


def test_nan_stays_in_its_pair(isa):
    x, (cos, sin) = torch.zeros(1, 1, 4, 20), ops.rotary_tables(4, 16)
    x[0, 0, 2, 3] = float("nan")
    bad = ops.rotary(x, cos, sin).isnan().nonzero()
    assert bad.tolist() == [[0, 0, 2, 3], [0, 0, 2, 11]]
    assert bitwise(ops.rotary(x, cos, sin)[..., 16:], x[..., 16:])


X, (COS, SIN) = torch.zeros(2, 3, 4, 8), ops.rotary_tables(5, 8)
PLACES = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.rotary(X[0], COS, SIN), ValueError, r"rotary: x has shape \(3, 4, 8\); expected \(B, H, T, D\)"),
        (lambda: ops.rotary(X.int(), COS, SIN), TypeError, "rotary: x has dtype torch.int32"),
        (
            lambda: ops.rotary(X, COS.bfloat16(), SIN),
            TypeError,
            "rotary: cos has dtype torch.bfloat16; expected float32",
        ),
        (lambda: ops.rotary(X, None, SIN), TypeError, "rotary: cos is a NoneType"),
        (lambda: ops.rotary(X, COS, SIN[:4]), ValueError, r"rotary: cos has shape \(5, 4\) and sin \(4, 4\)"),
        (lambda: ops.rotary(X, COS[:, :0], SIN[:, :0]), ValueError, "with R from 2 to the 8 channels of x"),
        (lambda: ops.rotary(X[..., :6], COS, SIN), ValueError, "with R from 2 to the 6 channels of x"),
        (lambda: ops.rotary(X, COS[:3], SIN[:3]), ValueError, "rotary: x has 4 positions but cos has 3 rows"),
        (lambda: ops.rotary(X, COS, SIN, layout="halves"), ValueError, "rotary: layout is 'halves'; expected one of"),
        (
            lambda: ops.rotary(X, COS, SIN, positions=PLACES.float()),
            TypeError,
            "rotary: positions has dtype torch.float32; expected int64 or int32",
        ),
        (
            lambda: ops.rotary(X, COS, SIN, positions=PLACES[:3]),
            ValueError,
            r"rotary: positions has shape \(3,\); expected \(4,\) or \(2, 4\)",
        ),
        (lambda: ops.rotary(X, COS, SIN, positions=[0, 1, 2, 3]), TypeError, "rotary: positions is a list"),
        (
            lambda: ops.rotary(X, COS, SIN, positions=PLACES + 2),
            IndexError,
            "rotary: positions holds 5; expected 0 to 4",
        ),
        (
            lambda: ops.rotary(X, COS, SIN, positions=PLACES - 1),
            IndexError,
            "rotary: positions holds -1; expected 0 to 4",
        ),
        (lambda: ops.rotary(X, COS.to("meta"), SIN), ValueError, "rotary: all tensors must be on one device"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
