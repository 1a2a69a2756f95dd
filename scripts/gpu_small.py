"""Calls of each op. Small ones run every CUDA kernel that the GPU chooses at least once, under compute-sanitizer, where a kernel takes a
hundred times longer; with --real they have the shapes of GPT-2, under Nsight Compute. No reference: it is the tools that look."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import gptfast
from gptfast import ops
from gptfast.ops import RowNorm, few_backend, linear_few, takes_few
from gptfast.ops._append import append_and_attend

FORMATS = {"int8": 32, "int4": 32, "nf4": 64, "mxfp4": 32}


def calls(device: str, real: bool) -> None:
    T, C, V = (2048, 768, 50257) if real else (70, 96, 311)
    x, residual = (torch.randn(T, C, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    w, b = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    targets = torch.randint(V, (T,), device=device)
    table = torch.randn(V, C, device=device, dtype=torch.bfloat16).requires_grad_()
    many = x.detach().repeat(1 if real else 9, 1).requires_grad_()
    for rows in (x, many):  # of few rows each has a block
        ops.layer_norm(rows, w, b).sum().backward()
        ops.rms_norm(rows, w).sum().backward()
    y, total = ops.add_layer_norm(x, residual, w, b, dropout_p=0.1, seed=1)
    (y.sum() + total.sum()).backward()
    y, total = ops.add_rms_norm(x, residual, w, dropout_p=0.1, seed=1)
    (y.sum() + total.sum()).backward()
    ops.gelu(x, b).sum().backward()
    ops.relu_squared(x).sum().backward()
    ops.swiglu(x, residual).sum().backward()
    ops.swiglu(x, layout="interleaved", alpha=1.702, limit=7.0).sum().backward()
    for layout in ("neox", "interleaved"):
        heads = torch.randn(1, 3, T, 64, device=device, dtype=torch.bfloat16).requires_grad_()
        ops.rms_norm(heads, w[:64]).sum().backward()
        ops.rotary(heads, *ops.rotary_tables(T, 48, device=device), layout=layout).sum().backward()
    ops.dropout(x, 0.1, 1).sum().backward()
    ops.linear_cross_entropy(x, table, targets).backward()
    ops.cross_entropy(torch.randn(T, V, device=device, dtype=torch.bfloat16).requires_grad_(), targets).backward()
    ops.embedding(targets, table).sum().backward()
    attention(device, T, real)
    few_rows(x, table[:C], w)
    packed(device, T, C, V)
    ops.sample(torch.randn(3, V, device=device), top_k=50, top_p=0.9, seed=1)
    few = torch.randn(2, 9000, device=device)  # long rows: in parts, a block each
    ops.sample(few, top_k=50, seed=1)
    ops.sample_rows(few, torch.tensor([ops.row_options(top_k=50, seed=n) for n in (1, 2)], device=device))


def attention(device: str, T: int, real: bool) -> None:
    """On Hopper by TMA and wgmma, but for a soft cap and fp32, which take the kernels of every GPU."""
    sinks = torch.randn(2, device=device).requires_grad_()
    for D in (64, 128, 40):
        q, k, v = torch.randn(3, 1, 2, T, D, device=device, dtype=torch.bfloat16).requires_grad_().unbind()
        ops.causal_attention(q, k, v).sum().backward()
        ops.causal_attention(q, k, v, dropout_p=0.1, seed=1).sum().backward()
        if not real:
            ops.causal_attention(q, k, v, sinks, softcap=30.0).sum().backward()
            ops.causal_attention(*(x.float() for x in (q, k, v)), causal=False).sum().backward()
            ops.causal_attention(q, *(x[:, :1] for x in (k, v)), enable_gqa=True).sum().backward()
        keys, values = (x.detach().repeat(1, 1, 9, 1) for x in (k, v))
        new = [x[:, :, -1:].detach() for x in (q, k, v)]
        ops.causal_attention(new[0], keys, values)
        lengths, counters = torch.tensor([8 * T], device=device), torch.zeros(2, dtype=torch.int32, device=device)
        for ready in (False, True):
            append_and_attend(*new, keys, values, lengths, counters, cache_ready=ready)


def few_rows(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """A layer of a decoding step, with a norm and without, of few features and of many."""
    x, weight, scale = (t.detach().bfloat16() for t in (x[:5], weight, scale))
    for times in (1, 16 if x.shape[1] < 128 else 4):
        wide, layer, norm = (
            x.repeat(1, times),
            weight.repeat(1, times),
            RowNorm("layer_norm", scale.repeat(times), None, 1e-5),
        )
        runs_on = few_backend(wide)
        if runs_on is None or not takes_few(*wide.shape, True):
            raise RuntimeError(f"linear_few does not take {tuple(wide.shape)}")
        linear_few(runs_on, wide, layer, None, norm=norm, activation="gelu", weights_ready=True)
        linear_few(runs_on, wide, layer, None, residual=layer[:5, : len(layer)])


def packed(device: str, T: int, C: int, V: int) -> None:
    """Products by codes: few rows, many, and the gradient."""
    weight = torch.randn(V, 4 * C, device=device)
    for format, size in FORMATS.items():
        if format == "mxfp4":
            codes = ops.quantize_mxfp4(weight)
        else:
            codes = ops.quantize_nf4(weight).rows(V) if format == "nf4" else ops.quantize_groups(weight, format)
        for rows in (1, 5, T):
            wide = torch.randn(rows, 4 * C, device=device, dtype=torch.bfloat16).requires_grad_()
            ops.quantized_linear(wide, *codes, format=format, group_size=size).sum().backward()
        for rows in (1, T):
            wide = torch.randn(rows, 4 * C, device=device).requires_grad_()
            ops.quantized_linear(wide, *codes, format=format, group_size=size).sum().backward()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", action="store_true", help="shapes of GPT-2")
    parser.add_argument("--try", action="store_true", dest="trial", help="on the emulator")
    options = parser.parse_args()
    if options.trial:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from tests.support import emulated

        emulated.load()
    with gptfast.backend("emu" if options.trial else "cuda"):
        calls("cpu" if options.trial else "cuda", options.real and not options.trial)
    if not options.trial:
        torch.cuda.synchronize()
    print("all calls ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
