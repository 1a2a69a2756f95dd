"""A part of a batch draws what the whole batch draws there: first_row of the ops that drop."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops, rng

KEY = {"seed": 2**63 + 5, "offset": 2**32 - 1}
PARTS = [(0, 2), (2, 3), (3, 7)]


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1])).sum(), inputs))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_parts_of_a_batch_are_dropped_as_the_whole(backend):
    x = torch.randn(7, 5, 70)
    whole = ops.dropout(x, 0.4, **KEY, backend=backend)
    parts = [ops.dropout(x[a:b], 0.4, **KEY, first_row=a, backend=backend) for a, b in PARTS]
    assert torch.cat(parts).equal(whole)
    assert not ops.dropout(x[2:3], 0.4, **KEY, backend=backend).equal(parts[1])
    flat = ops.dropout(x[3:].flatten(0, 1), 0.4, **KEY, first_row=15, backend=backend)
    assert flat.view(4, 5, 70).equal(whole[3:])


@pytest.mark.parametrize("backend", [None, "eager"])
def test_parts_of_a_batch_are_normalised_as_the_whole(backend):
    x, residual = torch.randn(7, 5, 70, requires_grad=True), torch.randn(7, 5, 70)
    weight, bias = torch.rand(70), torch.rand(70)

    def run(a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"dropout_p": 0.4, **KEY, "first_row": a, "backend": backend}
        y, _ = ops.add_layer_norm(x[a:b], residual[a:b], weight, bias, **options)
        return y, gradients(y, x)[0][a:b]

    whole = run(0, 7)
    for n, parts in enumerate(zip(*(run(a, b) for a, b in PARTS), strict=True)):
        torch.testing.assert_close(torch.cat(parts), whole[n], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_parts_of_a_batch_attend_as_the_whole(backend, key_heads):
    q = torch.randn(7, 4, 33, 16, requires_grad=True)
    k, v = (torch.randn(7, key_heads, 33, 16, requires_grad=True) for _ in range(2))

    def run(a: int, b: int) -> list[torch.Tensor]:
        options = {"dropout_p": 0.4, **KEY, "first_row": a, "enable_gqa": True, "backend": backend}
        out = ops.causal_attention(q[a:b], k[a:b], v[a:b], **options)
        return [out, *(g[a:b] for g in gradients(out, q, k, v))]

    whole = run(0, 7)
    for n, parts in enumerate(zip(*(run(a, b) for a, b in PARTS), strict=True)):
        torch.testing.assert_close(torch.cat(parts), whole[n], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("row", "error"), [(-1, ValueError), (2**31, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_first_row_out_of_range_is_refused(row, error):
    with pytest.raises(error, match="first_row is"):
        rng.at_row("dropout", 0, row)
    with pytest.raises(error, match="first_row is"):
        ops.dropout(torch.ones(1, 4), 0.5, 0, 0, first_row=row)
