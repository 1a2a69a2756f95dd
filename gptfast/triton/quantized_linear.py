"""x W^T + bias and dy W over a weight of 8 or 4 bits a value, unpacked in registers on the way to the tensor cores.

    y[m, n] = sum_g scale[n, g] sum_(k in group g) x[m, k] value[n, k]        dx[m, k] = sum_n dy[m, n] scale[n, g] value[n, k]

Each step of forward multiplies a group of K and scales the product in float32, so integer codes are multiplied exactly.
A program handles a tile of y. With few rows and few outputs that leaves most of a GPU idle: the groups are then split among
programs, whose partial sums a second kernel adds in a fixed order.
Floor with up to 16 rows: one read of the packed weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._codes import code_table, load_scales, load_values
from gptfast.triton._rows import load_vector, sum_rows
from gptfast.triton._tiles import Blocks, product_dtype
from gptfast.triton._tuning import fastest

FEW_ROWS = 16  # the minimum of tensor cores; fewer rows are padded
PROGRAMS = 256  # enough for every GPU; a constant, so that results do not depend on the GPU
LEAST_GROUPS = 4  # of a split


def quantized_linear_fwd(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format: str,
    group_size: int,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    check_decoded(nested_absmax, offset)
    (M, K), (N, G) = x.shape, scales.shape
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x, codes, scales = (t.contiguous() for t in (x, codes, scales))
    bias = None if bias is None else bias.contiguous()
    splits = splits_of(M, N, G)
    parts = out if splits == 1 else torch.empty((splits, M * N), dtype=torch.float32, device=x.device)
    per_split = triton.cdiv(G, splits)

    def launch(blocks: Blocks) -> None:
        grid = (triton.cdiv(M, blocks.m) * triton.cdiv(N, blocks.n), splits)
        tensors = (x, codes, scales, bias, code_table(format, x.device), parts)
        _fwd_kernel[grid](
            *tensors,
            *(M, N, K, G, codes.shape[1], per_split),
            FORMAT=format,
            GROUP=group_size,
            DTYPE=product_dtype(x.dtype),
            **blocks.options(),
        )

    kind = (str(x.dtype), format, group_size, triton.next_power_of_2(M), N, K)
    launch(fastest("quantized_linear_fwd", kind, candidates(M, x.dtype), launch))
    return out if splits == 1 else sum_rows(parts, x.dtype).view(M, N)


def quantized_linear_bwd(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    format: str,
    group_size: int,
    in_features: int,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    check_decoded(nested_absmax, offset)
    (M, N), G = dy.shape, scales.shape[1]
    dx = torch.empty((M, in_features), dtype=dy.dtype, device=dy.device)
    if not dx.numel():
        return dx
    dy, codes, scales = (t.contiguous() for t in (dy, codes, scales))

    def launch(blocks: Blocks) -> None:
        _bwd_kernel[(triton.cdiv(M, blocks.m) * G,)](
            *(dy, codes, scales, code_table(format, dy.device), dx),
            *(M, N, in_features, G, codes.shape[1]),
            FORMAT=format,
            GROUP=group_size,
            DTYPE=product_dtype(dy.dtype),
            **blocks.options(),
        )

    kind = (str(dy.dtype), format, group_size, triton.next_power_of_2(M), N, in_features)
    launch(fastest("quantized_linear_bwd", kind, candidates(M, dy.dtype), launch))
    return dx


def check_decoded(nested_absmax: Tensor | None, offset: Tensor | None) -> None:
    if nested_absmax is not None or offset is not None:
        raise ValueError("quantized_linear: doubly quantised scales are decoded before Triton's kernels")


def splits_of(M: int, N: int, G: int) -> int:
    """Number of programs among which the groups of a row are split: a function of the shape alone."""
    if M > FEW_ROWS:
        return 1
    wanted = triton.cdiv(PROGRAMS * 32, N)
    return max(1, min(wanted, G // LEAST_GROUPS))


def candidates(M: int, dtype: torch.dtype) -> list[Blocks]:
    """Candidates for `fastest`."""
    if (
        dtype == torch.float32
    ):  # no tensor cores: larger tiles take minutes to compile (see float32_blocks of attention)
        return [Blocks(FEW_ROWS, 32, 4, 2)] if M <= FEW_ROWS else [Blocks(32, 32, 8, 1)]
    if M <= FEW_ROWS:
        return [Blocks(FEW_ROWS, 32, 4, 4), Blocks(FEW_ROWS, 64, 4, 3), Blocks(FEW_ROWS, 16, 2, 4)]
    return [Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3)]


@triton.jit
def _fwd_kernel(
    x,
    codes,
    scales,
    bias,
    table,
    out,
    M,
    N,
    K,
    G,
    row_bytes,
    per_split,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column_blocks = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if split == 0:
        total += load_vector(bias, n, N)[None, :]
    for g in range(split * per_split, tl.minimum((split + 1) * per_split, G)):
        k = g * GROUP + tl.arange(0, GROUP)
        inside = (m[:, None] < M) & (k[None, :] < K)
        rows = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], inside, other=0.0).to(DTYPE)
        values = load_values(codes, table, n, N, g * GROUP, row_bytes, FORMAT, GROUP).to(DTYPE)
        scale = load_scales(scales, n, N, g, G, FORMAT)
        total += tl.dot(rows, tl.trans(values), input_precision="ieee") * scale[None, :]
    place = (split * M + m).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), (m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _bwd_kernel(
    dy,
    codes,
    scales,
    table,
    dx,
    M,
    N,
    K,
    G,
    row_bytes,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0) // G * BLOCK_M + tl.arange(0, BLOCK_M)
    g = tl.program_id(0) % G
    total = tl.zeros((BLOCK_M, GROUP), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (m[:, None] < M) & (n[None, :] < N)
        upstream = tl.load(dy + m.to(tl.int64)[:, None] * N + n[None, :], inside, other=0.0).to(DTYPE)
        values = load_values(codes, table, n, N, g * GROUP, row_bytes, FORMAT, GROUP)
        scale = load_scales(scales, n, N, g, G, FORMAT)
        total = tl.dot(upstream, (values * scale[:, None]).to(DTYPE), total, input_precision="ieee")
    k = g * GROUP + tl.arange(0, GROUP)
    place = m.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dx + place, total.to(dx.dtype.element_ty), (m[:, None] < M) & (k[None, :] < K))
