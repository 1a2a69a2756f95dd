"""Every op on both sides of each size where its CPU code takes another way: results that go past the caches, blocks of a
row, chunks of rows, stretches of a product, slices of attention.

What a row gives must not depend on which way was taken, so most results are compared to the bit with the same rows in
calls of a few rows. The constants are those of csrc; a new one there gets its sizes here.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.testing import Case, check_case
from tests.support.op_properties import bitwise, check_repeatable

STREAM_BYTES = 16 << 20  # kStreamBytes: larger results go past the caches where their rows are whole cache lines
KEPT_BYTES = 2 << 20  # new_tensor: larger results lie in kept memory
ROW_CHUNK = 64  # kRowChunk: rows of a partial sum
BLOCK = 2048  # kGeluBlock, kLossBlock, kDropoutBlock: columns at a time
FLAT_ROW = 4096  # gelu without bias cuts its values into such rows
GRAIN = 32768  # bytes of rows that a thread takes at least
QUERIES = 64  # kAttentionBlock


def rows_of(N: int, C: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, C), each of 257 rows different from the others; made fast."""
    base = torch.randn(257, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    return base[torch.arange(N) % 257]


def differentiated(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(outputs, inputs, [upstream] * len(outputs))
    return [t.detach() for t in (*outputs, *grads)]


def gelu(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Results and gradients that have a row for each row of x."""
    return differentiated((ops.gelu(x, weight, "tanh"),), (x,), x.detach())


def layer_norm(x: Tensor, weight: Tensor) -> list[Tensor]:
    return differentiated((ops.layer_norm(x, weight, weight),), (x,), x.detach())


def add_layer_norm(x: Tensor, weight: Tensor) -> list[Tensor]:
    residual = (x.detach() * 2).requires_grad_()
    return differentiated(ops.add_layer_norm(x, residual, weight, weight), (x, residual), x.detach())


def cross_entropy(x: Tensor, weight: Tensor) -> list[Tensor]:
    targets = x.detach()[:, :5].argmax(1)
    loss = ops.cross_entropy(x, targets, reduction="none", label_smoothing=0.1)
    return differentiated((loss,), (x,), torch.ones(len(x)))


def rms_norm(x: Tensor, weight: Tensor) -> list[Tensor]:
    return differentiated((ops.rms_norm(x, weight),), (x,), x.detach())


def relu_squared(x: Tensor, weight: Tensor) -> list[Tensor]:
    return differentiated((ops.relu_squared(x),), (x,), x.detach())


def swiglu(x: Tensor, weight: Tensor) -> list[Tensor]:
    up = (x.detach() * 2).requires_grad_()
    return differentiated((ops.swiglu(x, up, alpha=1.7, limit=1.0),), (x, up), x.detach())


def packed_swiglu(x: Tensor, weight: Tensor) -> list[Tensor]:
    """A result is half as large, its gradient as large."""
    both = [torch.cat([x, x], -1).detach().requires_grad_() for _ in range(2)]
    y = [ops.swiglu(b, layout=layout) for b, layout in zip(both, ("halves", "interleaved"), strict=True)]
    return differentiated(tuple(y), tuple(both), x.detach())


def rotary(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Eight heads, if they share the row evenly."""
    heads = x.view(len(x), 1, -1, x.shape[1] // 8 if x.shape[1] % 8 == 0 else x.shape[1]).transpose(1, 2)
    tables = ops.rotary_tables(1, heads.shape[3] // 32 * 32)
    return differentiated((ops.rotary(heads, *tables),), (x,), heads.detach())


OPS = (gelu, layer_norm, add_layer_norm, rms_norm, relu_squared, swiglu, packed_swiglu, rotary, cross_entropy)
BY_ROWS = {f.__name__: f for f in OPS}


@pytest.mark.parametrize("op", BY_ROWS)
@pytest.mark.parametrize(
    ("dtype", "C"),
    [
        pytest.param(torch.float32, 1024, id="fp32-whole_lines"),
        pytest.param(torch.float32, 1001, id="fp32-odd"),  # such rows must stay in the caches
        pytest.param(torch.bfloat16, 2048, id="bf16-whole_lines"),
    ],
)
def test_results_past_the_caches(op, dtype, C, isa):
    """From 16 MiB on, beside calls of 37 rows: the first, the last, and some in the middle."""
    N = STREAM_BYTES // (C * dtype.itemsize) + 1
    x, weight = rows_of(N, C, dtype), torch.randn(C).to(dtype)
    whole = BY_ROWS[op](x.requires_grad_(), weight)
    for first in (0, N // 2, N - 37):
        part = BY_ROWS[op](x.detach()[first : first + 37].clone().requires_grad_(), weight)
        for n, (a, b) in enumerate(zip(whole, part, strict=True)):
            assert bitwise(a[first : first + 37], b), f"result {n}, rows from {first} on"


@pytest.mark.parametrize("C", [1024, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_embeddings_past_the_caches(dtype, C, isa):
    N = STREAM_BYTES // (C * dtype.itemsize) + 1
    wte, wpe, ids = torch.randn(11, C).to(dtype), torch.randn(13, C).to(dtype), torch.randint(11, (N,))
    positions = torch.arange(N) % 13
    assert torch.equal(ops.embedding(ids, wte), wte[ids])
    assert torch.equal(ops.embedding(ids, wte, wpe, positions), wte[ids] + wpe[positions])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norms_with_dropout_past_the_caches(dtype, isa):
    """Two gradients a row. The part draws what the whole draws there."""
    C = 1024
    N = STREAM_BYTES // (C * dtype.itemsize) + 1
    x, weight = rows_of(N, C, dtype), torch.randn(C).to(dtype)

    def results(first: int, count: int) -> list[Tensor]:
        branch = x[first : first + count].clone().requires_grad_()
        residual = (branch.detach() * 2).requires_grad_()
        y = ops.add_rms_norm(branch, residual, weight, dropout_p=0.3, seed=5, first_row=first)
        return differentiated(y, (branch, residual), branch.detach())

    whole = results(0, N)
    for first in (0, N // 2, N - 37):
        for n, (a, b) in enumerate(zip(whole, results(first, 37), strict=True)):
            assert bitwise(a[first : first + 37], b), f"result {n}, rows from {first} on"


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_dropout_past_the_caches(more, isa):
    C = 1024
    x = rows_of(STREAM_BYTES // (C * 4) + more, C)
    y = ops.dropout(x, 0.3, seed=5)
    assert torch.equal(y[:37], ops.dropout(x[:37], 0.3, seed=5))
    keep = y != 0
    assert torch.equal(y, torch.where(keep, x * (ops.dropout(torch.ones(1, 64), 0.3, seed=5).max()), 0.0))
    assert abs(keep.float().mean().item() - 0.7) < 1e-3


@pytest.mark.parametrize("C", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_of_a_row(dtype, C, isa):
    check_case(Case("gelu", {"N": 3, "C": C}), dtype)
    check_case(Case("dropout", {"N": 3, "C": C}, {"p": 0.2, "seed": 3}), dtype)
    check_case(Case("cross_entropy", {"N": 3, "V": C}, {"label_smoothing": 0.1}), dtype)


@pytest.mark.parametrize("C", [63, 64, 65])
@pytest.mark.parametrize("N", [ROW_CHUNK - 1, ROW_CHUNK, ROW_CHUNK + 1, 3 * ROW_CHUNK + 1])
def test_chunks_of_rows(N, C, isa):
    """Sums over rows: those of each chunk by itself, added in order, to the bit (gelu adds two rows at a time first, but
    for the last of a call)."""
    x, residual, dy = torch.randn(3, N, C)
    calls = {
        "gelu": lambda rows, w, b: ops.gelu(x[rows], b, "tanh") + 0 * w,
        "layer_norm": lambda rows, w, b: ops.layer_norm(x[rows], w, b),
        "add_layer_norm": lambda rows, w, b: ops.add_layer_norm(x[rows], residual[rows], w, b)[0],
    }
    for name, call in calls.items():
        w, b = (torch.randn(C).requires_grad_() for _ in range(2))

        def sums(rows, call=call, w=w, b=b):
            return torch.autograd.grad(call(rows, w, b), (w, b), dy[rows])

        parts = [sums(slice(n, n + ROW_CHUNK)) for n in range(0, N, ROW_CHUNK)]
        for n, whole in enumerate(sums(slice(0, N))):
            total = parts[0][n]
            for part in parts[1:]:
                total = total + part[n]
            if name == "gelu":
                torch.testing.assert_close(whole, total, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(whole, total), (name, n)


@pytest.mark.parametrize(
    "n", [FLAT_ROW - 1, FLAT_ROW, FLAT_ROW + 1, 3 * FLAT_ROW + 1, KEPT_BYTES // 4 - 1, KEPT_BYTES // 4]
)
def test_gelu_of_any_number_of_values(n, isa):
    x = torch.randn(n, requires_grad=True)
    whole = differentiated((ops.gelu(x, approximate="tanh"),), (x,), x.detach())
    for first in {0, max(n - 1000, 0)}:
        part = x.detach()[first : first + 1000].clone().requires_grad_()
        for a, b in zip(
            whole, differentiated((ops.gelu(part, approximate="tanh"),), (part,), part.detach()), strict=True
        ):
            assert torch.equal(a[first : first + 1000], b)


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("op", ["gelu", "layer_norm", "rms_norm", "relu_squared", "swiglu", "dropout", "cross_entropy"])
def test_parts_for_threads(op, more, threads):
    """From so many rows on a second thread helps; backward from twice as many chunks on."""
    for parts in (1, 2):
        N = parts * GRAIN // (16 * 8) + more
        dims = {"N": N, "V" if op == "cross_entropy" else "C": 16}
        options = {"p": 0.1, "seed": 2} if op == "dropout" else {}
        check_repeatable(Case(op, dims, options), torch.float32)


@pytest.mark.parametrize("T", [8 * QUERIES - 1, 8 * QUERIES, 12 * QUERIES])
def test_slices_of_attention(T, isa):
    """From 512 queries on the backward of fewer than 16 heads is cut into slices, whose dk and dv are added."""
    q, k, v, dout = torch.randn(4, 16, 1, T, 16)
    calls = []
    for heads in (slice(0, 16), slice(0, 1), slice(15, 16)):
        leaves = [x[heads].clone().requires_grad_() for x in (q, k, v)]
        out = ops.causal_attention(*leaves)
        calls.append((heads, [out, *torch.autograd.grad(out, leaves, dout[heads])]))
    whole = calls[0][1]
    for heads, part in calls[1:]:
        assert torch.equal(whole[0][heads], part[0]) and torch.equal(whole[1][heads], part[1])
        for a, b in zip(whole[2:], part[2:], strict=True):  # other sums: measured 5e-7 of the largest
            torch.testing.assert_close(a[heads], b, rtol=0, atol=4e-6 * b.abs().max().item())


def test_chunks_of_logits(monkeypatch):
    """Rows of logits beside the bytes of a chunk: the losses are those of one chunk, to the bit, at any number."""
    hidden, weight, targets = torch.randn(195, 24), torch.randn(33, 24), torch.randint(33, (195,))
    whole = ops.linear_cross_entropy(hidden, weight, targets, reduction="none")
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), targets, reduction="none")
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-5)
    for rows in (96, 97, 194, 195, 196):
        monkeypatch.setattr(sys.modules["gptfast.ops._logit_chunks"], "CHUNK_BYTES", rows * 33 * 4)
        assert torch.equal(ops.linear_cross_entropy(hidden, weight, targets, reduction="none"), whole), rows
