"""sample where rows are fewer than processors: a row in parts, a block each, gives the tokens of one block."""

from __future__ import annotations

import math

import pytest
import torch

from gptfast import ops
from gptfast.testing import DTYPES
from tests.support import emulated

V = 9001  # odd: rows begin anywhere between two accesses; the last part is shorter
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 50},
    {"top_k": 1},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 512, "temperature": 2.0},
    {"top_k": 513},  # too many to list
    {"top_k": V, "seed": 2**64 - 1},
    {"top_p": 0.6},
]


def rows() -> torch.Tensor:
    logits = torch.randn(7, V) * 3
    logits[1] = logits[1].round()  # many ties
    logits[2] = 1.5
    logits[3, torch.arange(V) % 3000 != 7] = -math.inf  # four tokens, in as many parts
    logits[4, : V // 2] = -math.inf
    logits[5, 20] = 1e30  # the noise is nothing beside it
    logits[6] *= 1e-3
    return logits


@pytest.mark.parametrize("dtype", [pytest.param(DTYPES[n], id=n) for n in ("fp32", "bf16")])
def test_the_tokens_of_the_reference(dtype, emu):
    logits = rows().to(dtype)
    for options in OPTIONS:
        for x in (logits, logits[1:2]):
            for position in (3, 2**32 - 1):
                got = ops.sample(x, position=position, **options)
                assert torch.equal(got, ops.sample(x, position=position, backend="cpu", **options)), options


def test_rows_with_options_of_their_own(emu):
    """Some are joined from their parts, others drawn by one block."""
    logits = rows()[[0] * len(OPTIONS)]
    options = torch.tensor([ops.row_options(**{"temperature": 1.0, **one}) for one in OPTIONS])
    places = torch.arange(len(OPTIONS))
    got, expected = (
        ops.sample_rows(logits, options, position=places, stream=places, backend=b) for b in ("emu", "cpu")
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_rows_that_have_no_token(options, emu):
    for place in (0, V - 1):
        logits = rows()[:2]
        logits[1, place] = math.nan
        with pytest.raises(RuntimeError, match=r"sample: logits\[1\] holds nan"):
            ops.sample(logits, **options)
    with pytest.raises(RuntimeError, match=r"sample: logits\[0\] holds nothing but -inf"):
        ops.sample(torch.full((1, V), -math.inf), **options)


@pytest.mark.parametrize("smem", [0, 48 << 10], ids=["in parts", "by one block"])
def test_a_gpu_of_less_shared_memory(smem, emu):
    """Lists of 64 KB do not fit into the smallest: there a block has a row."""
    emulated.configure("reverse", smem=smem)
    logits = rows()
    for k in (0, 50):
        assert torch.equal(ops.sample(logits, top_k=k), ops.sample(logits, top_k=k, backend="cpu"))
