"""Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Every random decision of gptfast is a pure function of (seed, coordinates), so CPU, CUDA, Triton and this eager
version agree for any thread count and any batch composition. Two layouts sit on the generator:

* dropout: counter = (c0(j), i, m, offset), eight 16-bit decisions per call along a row (see `dropout_keep`);
* sampling: counter = (t >> 2, position, stream, "samp"), one 32-bit word per token (see `gumbel_noise`).
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
SAMPLING_DOMAIN = 0x73616D70  # "samp"


def check_counter(op: str, name: str, value: int, bits: int = 32) -> int:
    """Return `value` if it is an integer in [0, 2**bits), else raise ValueError."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} is {value!r} ({type(value).__name__}); expected a Python int")
    if _known(value < 0) or _known(value >= 2**bits):
        raise ValueError(f"{op}: {name} is {value}; expected 0 <= {name} < 2**{bits}")
    return value


def as_int64(seed: int) -> int:
    """The two's-complement int64 with the bits of `seed` (operator schemas have no unsigned integers)."""
    return seed - 2**64 if _known(seed >= 2**63) else seed


def _known(condition: bool) -> bool:
    """The condition; while torch.compile traces: false where it depends on a number that a graph takes when it runs."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return condition


def at_row(op: str, offset: int, first_row: int, each: int = 1) -> int:
    """An offset that also says which row (matrix, in attention) of the whole batch the first one of a tensor is: what a
    part of a batch draws is then what the whole draws there.

    Args:
        op: for messages.
        offset: in [0, 2**32), the number of the mask.
        first_row: in [0, 2**31), in dimension 0 of the tensor.
        each: rows (matrices) of the mask that one of these has; first_row * each < 2**31.
    Returns:
        first_row * each * 2**32 + offset.
    Raises:
        TypeError, ValueError: not an integer in range.
    """
    if type(first_row) is int and first_row == 0:
        return offset
    check_counter(op, "first_row", first_row, 31)
    return offset + check_counter(op, "first_row times the rows of each", first_row * each, 31) * 2**32


def philox4x32(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of a counter of four broadcastable int64 tensors holding 32-bit values.

    Args:
        counter: four int64 tensors with values in [0, 2**32), broadcast against each other.
        seed: key, in [0, 2**64), or the int64 with these bits: its low and its high 32 bits.
    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _M0)
        hi1, lo1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m for 32-bit operands, without leaving the range of int64."""
    low = a * (m & 0xFFFF)  # < 2**48
    high = a * (m >> 16) + (low >> 16)  # a * m == (high << 16) + (low & 0xFFFF)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def dropout_threshold(p: float) -> int:
    """t = round(p * 65536): an element is dropped when its 16-bit lane is < t."""
    return round(p * 65536)


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: 65536 / (65536 - t), and 0 where everything is dropped."""
    t = dropout_threshold(p)
    return 65536 / (65536 - t) if t < 65536 else 0.0


def dropout_keep(
    shape: tuple[int, int, int],
    p: float,
    seed: int,
    offset: int,
    device: torch.device | str = "cpu",
    first: tuple[int, int] = (0, 0),
) -> Tensor:
    """Keep decisions of dropout for `shape` = (matrices, rows, cols).

    Element (m, i, j) uses counter (((j >> 5) << 2) | ((j >> 1) & 3), i, m, offset) and the 16-bit lane
    (((j >> 3) & 3) << 1) | (j & 1) of the 128 output bits, low half of each word first: the column order of the
    accumulator fragments of `mma.m16n8`, so that one call serves one GPU thread eight values of its row.

    Args:
        first: (matrix, row) that the first ones are in the whole batch, which are added to m and i.
    Returns:
        bool tensor of `shape`; True = kept.
    """
    m, i, j = (torch.arange(n, device=device, dtype=torch.int64) for n in shape)
    m, i, j = m[:, None, None] + first[0], i[None, :, None] + first[1], j[None, None, :]
    c0 = ((j >> 5) << 2) | ((j >> 1) & 3)
    words = philox4x32((c0, i, m, torch.full_like(j, offset)), seed)
    word = torch.stack(words).gather(0, ((j >> 3) & 3).expand(shape)[None])[0]
    lane = (word >> (16 * (j & 1))) & 0xFFFF
    return lane >= dropout_threshold(p)


def gumbel_noise(vocab_size: int, seed: int, position: Tensor, stream: Tensor) -> Tensor:
    """Gumbel noise -log(-log1p(-v)) of the sampling contract, fp32.

    v = min(x * 2**-32 + 2**-33, 1 - 2**-24) with x the Philox word t & 3 of counter (t >> 2, position, stream,
    0x73616d70): small v, where the largest noise comes from, is resolved to 2**-33.

    Args:
        vocab_size: V, number of tokens.
        seed: key in [0, 2**64).
        position, stream: (B,) int64, values in [0, 2**32).
    Returns:
        (B, V) fp32.
    """
    t = torch.arange(vocab_size, device=position.device, dtype=torch.int64)
    counter = (t >> 2, position[:, None], stream[:, None], torch.full_like(t, SAMPLING_DOMAIN))
    words = torch.stack(philox4x32(counter, seed))
    x = words.gather(0, (t & 3).expand(words.shape[1:])[None])[0]
    v = (x.float() * 2**-32 + 2**-33).clamp_max(1 - 2**-24)
    return -torch.log(-torch.log1p(-v))
