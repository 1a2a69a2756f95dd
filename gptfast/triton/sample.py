"""One token per row of logits: temperature, top-k, top-p, draw, without sorting the vocabulary. A program handles a row.

A token's rank is an integer: its logit as an ordered integer above the complement of its id, so larger is better, ties go
to the lowest id, and no two ranks are equal. Both cuts search for the largest rank such that the mass of the tokens from it
on reaches a goal: with mass 1 and goal k (top-k), or with mass exp((x - max) / T) and goal p times their sum (top-p). It is
found two bits at a time; masses are integers in units of 2^-40, so the order of adding does not matter.
The draw is the Gumbel maximum argmax x / T + noise (Maddison et al., arXiv 1411.0030).

Floor: one read of the row from memory; the passes of the cuts, 24 each for GPT-2's vocabulary, read it from L2.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._philox import gumbel_noise
from gptfast.triton._rows import rows_of

SMALLEST_TEMPERATURE = 2.0**-126
SMALLEST = tl.constexpr(SMALLEST_TEMPERATURE)
BLOCK = 4096
NAN, NOTHING, BAD_OPTIONS = tl.constexpr(-1), tl.constexpr(-2), tl.constexpr(-3)  # answers for rows without a token
UNIT = tl.constexpr(2.0**40)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, position: Tensor, stream: Tensor
) -> Tensor:
    # floats come to kernels in float32
    top_p_bits = struct.unpack("q", struct.pack("d", top_p))[0]
    same = (max(temperature, SMALLEST_TEMPERATURE), top_k, top_p_bits, seed & (2**64 - 1))
    cuts = {"DRAW": temperature >= SMALLEST_TEMPERATURE, "TOP_K": 0 < top_k < logits.shape[1], "TOP_P": top_p < 1}
    return _launch("sample", logits, position, stream, position, same, PER_ROW=False, **cuts)


def sample_rows(logits: Tensor, options: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    every = {"PER_ROW": True, "DRAW": True, "TOP_K": True, "TOP_P": True}
    return _launch("sample_rows", logits, position, stream, options.contiguous(), (1.0, 0, 0, 0), **every)


def _launch(
    op: str, logits: Tensor, position: Tensor, stream: Tensor, options: Tensor, same: tuple, **constants: bool
) -> Tensor:
    """same: temperature, top_k, the bits of top_p, and the seed of all rows, where these have no options of their own."""
    R, V = logits.shape
    out = torch.empty(R, dtype=torch.int64, device=logits.device)
    if not R:
        return out
    rows = rows_of(logits)
    id_bits = (V - 1).bit_length()
    _kernel[(R,)](
        rows,
        position.contiguous(),
        stream.contiguous(),
        options,
        out,
        rows.stride(0),
        V,
        *same,
        ID_BITS=id_bits + id_bits % 2,
        BLOCK_V=min(BLOCK, max(32, triton.next_power_of_2(V))),
        num_warps=16,
        **constants,
    )
    _check(op, out)
    return out


def _check(op: str, tokens: Tensor) -> None:
    """Raise for rows without a token. During graph capture no sync is allowed; the codes are returned unchanged."""
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    for r, token in enumerate(tokens.tolist()):
        if token == NAN.value:
            raise RuntimeError(f"{op}: logits[{r}] holds nan - look for an overflow in the model")
        if token == NOTHING.value:
            raise RuntimeError(f"{op}: logits[{r}] holds nothing but -inf; no token is left to draw")
        if token == BAD_OPTIONS.value:
            raise RuntimeError(f"{op}: options[{r}] are out of range: make them with row_options")


@triton.jit(do_not_specialize=["top_k", "top_p_bits", "seed"])
def _kernel(
    logits,
    position,
    stream,
    of_rows,
    out,
    stride,
    V,
    temperature,
    top_k,
    top_p_bits,
    seed,
    PER_ROW: tl.constexpr,
    DRAW: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    ID_BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    r = tl.program_id(0)
    row = logits + r.to(tl.int64) * stride
    k, p, key = tl.cast(top_k, tl.int64), _float64(tl.cast(top_p_bits, tl.int64)), tl.cast(seed, tl.uint64)
    t, bad = tl.cast(temperature, tl.float32), False
    if PER_ROW:
        given = _float64(tl.load(of_rows + 4 * r))
        k, p = tl.load(of_rows + 4 * r + 1), _float64(tl.load(of_rows + 4 * r + 2))
        key = tl.load(of_rows + 4 * r + 3).to(tl.uint64, bitcast=True)
        bad = ~((given >= 0) & (given < float("inf")) & (k >= 0) & (p > 0) & (p <= 1))
        t = given.to(tl.float32)
    best, has_nan = _maximum(row, V, BLOCK_V)
    greedy = True
    if DRAW:
        greedy = (t < SMALLEST) | ~(tl.abs(best / tl.maximum(t, SMALLEST)) < 1e30)  # the noise is nothing
    if bad:
        tl.store(out + r, BAD_OPTIONS)
    elif has_nan:
        tl.store(out + r, NAN)
    elif best == float("-inf"):
        tl.store(out + r, NOTHING)
    elif greedy:
        tl.store(out + r, _first(row, V, best, BLOCK_V).to(tl.int64))
    else:
        least = tl.cast(0, tl.uint64)  # the rank from which on tokens are kept
        if TOP_K and (k > 0) & (k < V):
            least = _rank_that_reaches(row, V, best, t, least, k, False, ID_BITS, BLOCK_V)
        if TOP_P and p < 1:
            total = _mass_from(row, V, best, t, least, ID_BITS, BLOCK_V)
            goal = tl.ceil(p * total.to(tl.float64)).to(tl.int64)
            least = _rank_that_reaches(row, V, best, t, least, goal, True, ID_BITS, BLOCK_V)
        at, of = tl.load(position + r), tl.load(stream + r)
        tl.store(out + r, _draw(row, V, t, least, at, of, key, TOP_K or TOP_P, ID_BITS, BLOCK_V).to(tl.int64))


@triton.jit
def _float64(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _load(row, v, V):
    return tl.load(row + v, v < V, other=float("-inf")).to(tl.float32) + 0.0  # -0 ranks as 0


@triton.jit
def _maximum(row, V, BLOCK_V: tl.constexpr):
    """The largest logit, and whether any is nan."""
    top = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    bad = tl.zeros((BLOCK_V,), tl.int32)
    for v0 in range(0, V, BLOCK_V):
        x = _load(row, v0 + tl.arange(0, BLOCK_V), V)
        top = tl.maximum(top, x)
        bad |= (x != x).to(tl.int32)
    return tl.max(top, 0), tl.max(bad, 0) != 0


@triton.jit
def _first(row, V, best, BLOCK_V: tl.constexpr):
    """The lowest id of the largest logit."""
    token = tl.zeros((BLOCK_V,), tl.int32) + V
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        token = tl.minimum(token, tl.where((_load(row, v, V) == best) & (v < V), v, V))
    return tl.min(token, 0)


@triton.jit
def _rank(x, v, ID_BITS: tl.constexpr):
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000).to(
        tl.uint64
    )  # integers in the order of the floats
    return (key << ID_BITS) | (((1 << ID_BITS) - 1) - v).to(tl.uint64)


@triton.jit
def _mass(x, best, temperature):
    return (tl.exp((x - best) / temperature) * UNIT).to(tl.int64)


@triton.jit
def _mass_from(row, V, best, temperature, least, ID_BITS: tl.constexpr, BLOCK_V: tl.constexpr):
    total = tl.zeros((BLOCK_V,), tl.int64)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        x = _load(row, v, V)
        total += tl.where((_rank(x, v, ID_BITS) >= least) & (v < V), _mass(x, best, temperature), 0)
    return tl.sum(total, 0)


@triton.jit
def _rank_that_reaches(
    row, V, best, temperature, least, goal, WEIGHED: tl.constexpr, ID_BITS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The largest rank such that the tokens from it on reach the goal, with mass 1 each or weighed; below `least`, none."""
    found = tl.cast(0, tl.uint64)
    for digit in range(0, (32 + ID_BITS) // 2):
        step = tl.cast(1, tl.uint64) << tl.cast(30 + ID_BITS - 2 * digit, tl.uint64)
        from1 = tl.zeros((BLOCK_V,), tl.int64)
        from2 = tl.zeros((BLOCK_V,), tl.int64)
        from3 = tl.zeros((BLOCK_V,), tl.int64)
        for v0 in range(0, V, BLOCK_V):
            v = v0 + tl.arange(0, BLOCK_V)
            x = _load(row, v, V)
            rank = _rank(x, v, ID_BITS)
            mass = _mass(x, best, temperature) if WEIGHED else tl.full((BLOCK_V,), 1, tl.int64)
            mass = tl.where((v < V) & (rank >= least), mass, 0)
            from1 += tl.where(rank >= found + step, mass, 0)
            from2 += tl.where(rank >= found + 2 * step, mass, 0)
            from3 += tl.where(rank >= found + 3 * step, mass, 0)
        reached = (tl.sum(from1, 0) >= goal).to(tl.uint64)
        reached += (tl.sum(from2, 0) >= goal).to(tl.uint64)
        reached += (tl.sum(from3, 0) >= goal).to(tl.uint64)
        found += reached * step
    return found


@triton.jit
def _draw(
    row,
    V,
    temperature,
    least,
    position,
    stream,
    seed,
    CUT: tl.constexpr,
    ID_BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    score = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK_V,), tl.int32) + V
    divisor = tl.zeros((BLOCK_V,), tl.float32) + temperature
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        x = _load(row, v, V)
        offered = tl.div_rn(x, divisor) + gumbel_noise(v0, position, stream, seed, BLOCK_V)
        if CUT:
            offered = tl.where(_rank(x, v, ID_BITS) >= least, offered, float("-inf"))
        better = offered > score  # ids rise: the first of equals stays
        score = tl.where(better, offered, score)
        token = tl.where(better, v, token)
    return tl.min(tl.where(score == tl.max(score, 0), token, V), 0)
