"""The Philox contract in Triton: the dropout decisions and the sampling noise of gptfast/rng.py, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

from gptfast import rng

SAMPLING_DOMAIN = tl.constexpr(rng.SAMPLING_DOMAIN)


def dropout_arguments(p: float, seed: int, offset: int) -> tuple[int, float, int, int]:
    """The arguments `threshold, keep_scale, seed, offset` of kernels, which make a tuple `dropout` of them.

    They are four scalars that kernels list in do_not_specialize, so that one compilation serves all values: Triton
    specialises on the values inside of a tuple argument.
    """
    return rng.dropout_threshold(p), rng.dropout_scale(p), seed & (2**64 - 1), offset


@triton.jit
def first_of(dropout):
    """The row, or the matrix of attention, that the first one of a tensor is in the whole batch (rng.at_row)."""
    return (tl.cast(dropout[3], tl.uint64) >> 32).to(tl.uint32)


@triton.jit
def keep_mask(matrix, rows, first_column, dropout, WIDTH: tl.constexpr):
    """(len(rows), WIDTH) decisions of dropout; first_column and WIDTH are multiples of 32.

    Call c0 = 4 g + k serves columns 32 g + 8 w + 2 k + {0, 1} with the halves of its word w (rng.dropout_keep), so one
    call makes eight decisions; the rest puts them into the order of columns.
    """
    least = tl.cast(dropout[0], tl.uint32)
    words = _dropout_words(matrix, rows, first_column, dropout, WIDTH)
    return _by_columns(tl.join((words & 0xFFFF) >= least, (words >> 16) >= least), rows.shape[0], WIDTH)


@triton.jit
def keep_bits(matrix, rows, first_column, dropout, WIDTH: tl.constexpr):
    """The same as int32 of which all bits are set, or none. Triton cannot move single bits through the shared memory of AMD's
    GPUs, and comparisons would become such bits before they are moved."""
    least = tl.cast(dropout[0], tl.int32)
    words = _dropout_words(matrix, rows, first_column, dropout, WIDTH)
    low, high = (words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32)
    return _by_columns(tl.join(~((low - least) >> 31), ~((high - least) >> 31)), rows.shape[0], WIDTH)


@triton.jit
def _dropout_words(matrix, rows, first_column, dropout, WIDTH: tl.constexpr):
    """(len(rows), WIDTH / 8, 2, 2): rows, calls, and two bits that number the words."""
    calls = (first_column // 8 + tl.arange(0, WIDTH // 8)).to(tl.uint32)[None, :]
    offset = tl.cast(dropout[3], tl.uint32)
    w0, w1, w2, w3 = tl.philox(dropout[2], calls, rows.to(tl.uint32)[:, None], tl.cast(matrix, tl.uint32), offset)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _by_columns(kept, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    kept = tl.reshape(kept, (HEIGHT, WIDTH // 32, 4, 4, 2))  # rows, g, k, w, half
    return tl.reshape(tl.permute(kept, (0, 1, 3, 2, 4)), (HEIGHT, WIDTH))


@triton.jit
def gumbel_noise(first, position, stream, seed, WIDTH: tl.constexpr):
    """(WIDTH,) values -log(-log1p(-v)) of rng.gumbel_noise for the tokens from `first`, a multiple of 4, on."""
    calls = (first // 4 + tl.arange(0, WIDTH // 4)).to(tl.uint32)
    domain = tl.full((1,), SAMPLING_DOMAIN, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, calls, position.to(tl.uint32), stream.to(tl.uint32), domain)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (WIDTH,))
    v = tl.minimum(words.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    return -tl.log(-_log1p_negative(v))


@triton.jit
def _log1p_negative(v):
    """log1p(-v) for v in (0, 1), to the last bits also where v is tiny, which decides the draw.

    Up to a half: -2 atanh(s), s = v / (2 - v), by its series; the first term left out is s^17 / 17 < 1e-9 s. Beyond, 1 - v
    is exact and its logarithm far from 0.
    """
    s = v / (2.0 - v)
    u = s * s
    series = 1.0 / 15
    series = series * u + 1.0 / 13
    series = series * u + 1.0 / 11
    series = series * u + 1.0 / 9
    series = series * u + 1.0 / 7
    series = series * u + 1.0 / 5
    series = series * u + 1.0 / 3
    series = series * u + 1.0
    return tl.where(v <= 0.5, -2.0 * s * series, tl.log(1.0 - v))
