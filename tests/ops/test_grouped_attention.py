"""causal_attention with fewer heads of k and v than of q (enable_gqa), beside torch's own; its parity cases stand in the op's table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptfast import ops
from gptfast.ops.causal_attention import causal_attention
from gptfast.testing import dtypes
from tests.support.op_properties import check_compiles


def inputs(H: int, K: int, T: int, D: int, dtype: torch.dtype = torch.float32, S: int | None = None) -> list[Tensor]:
    g = torch.Generator().manual_seed(H * K + T)
    sizes = (H, T), (K, S or T), (K, S or T)
    return [torch.randn(2, heads, n, D, generator=g).to(dtype).requires_grad_() for heads, n in sizes]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("K", [1, 2, 3, 6])
def test_equals_sdpa(K, dtype, isa):
    """Result and gradients, for groups whose size does not divide a vector too."""
    given = inputs(6, K, 45, 20, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = ops.causal_attention(*given, enable_gqa=True)
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    tolerance = 3e-6 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    for ours, theirs in zip([got, *torch.autograd.grad(got, given, upstream)], wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * 2)


def test_dropout_and_options_are_those_of_repeated_keys(isa):
    """The mask belongs to the query head, so a call that shares keys drops what one with copies of them drops."""
    q, k, v = inputs(6, 2, 70, 24, S=90)
    options: dict[str, Any] = {"dropout_p": 0.3, "seed": 7, "window": 40, "seq_lens": torch.tensor([90, 61])}
    copies = [x.detach().repeat_interleave(3, 1).requires_grad_() for x in (k, v)]
    got, lse = ops.causal_attention(q, k, v, enable_gqa=True, return_lse=True, **options)
    wanted, wanted_lse = ops.causal_attention(q, *copies, return_lse=True, **options)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
    dk, dv = torch.autograd.grad(got.square().sum(), (k, v))
    parts = torch.autograd.grad(wanted.square().sum(), copies)
    for ours, part in zip((dk, dv), parts, strict=True):
        torch.testing.assert_close(ours, part.unflatten(1, (2, 3)).sum(2), rtol=2e-5, atol=2e-5)


def test_what_is_masked_never_leaks(isa):
    q, k, v = inputs(4, 2, 40, 16)
    with torch.no_grad():
        k[0, :, 25:] = v[0, :, 25:] = k[1, 1, 33] = v[1, 1, 33] = float("nan")
    out = ops.causal_attention(q, k, v, enable_gqa=True)
    assert out[0, :, :25].isfinite().all() and not out[0, :, 25:].isfinite().any()
    assert out[1, :2].isfinite().all(), "the bad key is that of the other group"
    assert out[1, 2:, :33].isfinite().all() and not out[1, 2:, 33:].isfinite().any()


class Results(TorchDispatchMode):
    """The largest tensor that an operator returns inside."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_keys_are_not_copied(backend):
    q, k, v = inputs(8, 1, 2, 64, S=500)
    with Results() as results:
        out = ops.causal_attention(q, k, v, enable_gqa=True, backend=backend)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert 0 < results.most <= k.numel()


def test_one_head_for_each_query_head_needs_no_group():
    q, k, v = inputs(3, 3, 9, 8)
    assert torch.equal(ops.causal_attention(q, k, v, enable_gqa=True), ops.causal_attention(q, k, v))


def test_compiles():
    q, k, v = (x.detach() for x in inputs(4, 2, 20, 8))
    options: dict[str, Any] = {"dropout_p": 0.2, "seed": 5, "enable_gqa": True}
    check_compiles(lambda q, k, v: ops.causal_attention(q, k, v, **options) * 2, q, k, v)


def test_opcheck():
    q, k, v = (x.detach() for x in inputs(4, 2, 6, 8))
    options = (None, None, True, 0.3, 0.1, 5, 6, 0)
    op = torch.ops.gptfast
    torch.library.opcheck(op.causal_attention_fwd.default, (q, k, v, *options))
    out, statistics = op.causal_attention_fwd(q, k, v, *options)
    torch.library.opcheck(op.causal_attention_bwd.default, (q, q, k, v, out, statistics, *options))


Q = torch.zeros(2, 6, 5, 8)
ASKED: dict[str, Any] = {"enable_gqa": True}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: causal_attention(Q, Q[:, :2], Q[:, :2]), ValueError, "k has 2 heads but q has 6; .* enable_gqa=True"),
        (
            lambda: causal_attention(Q, Q[:, :4], Q[:, :4], **ASKED),
            ValueError,
            "k has 4 heads but q has 6; .* multiple",
        ),
        (lambda: causal_attention(Q[:, :3], Q, Q, **ASKED), ValueError, "k has 6 heads but q has 3; .* multiple"),
        (lambda: causal_attention(Q, Q[:, :0], Q[:, :0], **ASKED), ValueError, "k has 0 heads but q has 6"),
        (lambda: causal_attention(Q[:, :0], Q, Q, **ASKED), ValueError, "k has 6 heads but q has 0"),
        (
            lambda: causal_attention(Q, Q[:, :3], Q[:, :2], **ASKED),
            ValueError,
            "k has shape .* and v .* expected equal",
        ),
        (lambda: causal_attention(Q, Q[:1], Q[:1], **ASKED), ValueError, "k has batch 1 but q has 2"),
        (
            lambda: causal_attention(Q, Q, Q, enable_gqa=1),
            TypeError,
            r"enable_gqa is 1 \(int\); expected True or False",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("K", [0, 4, 12])
def test_kernels_refuse_heads_that_do_not_divide(K, isa):
    """Whoever calls the operator itself would read past the end of k."""
    if isa == "triton":
        pytest.skip("checks are the public function's there")
    op = torch.ops.gptfast_emu if isa == "emu" else torch.ops.gptfast
    k = torch.zeros(2, K, 5, 8)
    options = (None, None, True, 0.3, 0.0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=f"k has {K} heads, which do not divide the 6 of q"):
        op.causal_attention_fwd(Q, k, k, *options)
    with pytest.raises(RuntimeError, match=f"k has {K} heads, which do not divide the 6 of q"):
        op.causal_attention_bwd(Q, Q, k, k, Q, torch.zeros(2, 2, 6, 5), *options)
