"""A call of each op, which run every CUDA kernel once: under compute-sanitizer, where a kernel takes a hundred times longer, and under
Nsight Compute with --real shapes. No reference: it is the tools that look."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import gptfast
from gptfast import ops


def calls(device: str, real: bool) -> None:
    T, C, V = (2048, 768, 50257) if real else (70, 96, 311)
    x, residual = (torch.randn(T, C, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    w, b = (torch.randn(C, device=device).requires_grad_() for _ in range(2))
    targets = torch.randint(V, (T,), device=device)
    table = torch.randn(V, C, device=device, dtype=torch.bfloat16).requires_grad_()
    ops.layer_norm(x, w, b).sum().backward()
    y, total = ops.add_layer_norm(x, residual, w, b, dropout_p=0.1, seed=1)
    (y.sum() + total.sum()).backward()
    ops.rms_norm(x, w).sum().backward()
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
    ops.embedding(targets, table).sum().backward()
    for D in (64, 128, 40):  # on Hopper TMA and wgmma, and what runs everywhere
        q, k, v = torch.randn(3, 1, 2, T, D, device=device, dtype=torch.bfloat16).requires_grad_().unbind()
        ops.causal_attention(q, k, v, dropout_p=0.1, seed=1).sum().backward()
        ops.causal_attention(q[:, :, -1:].detach(), *(x.repeat(1, 1, 9, 1).detach() for x in (k, v)))
    for format, size in (("int8", 32), ("int4", 32), ("nf4", 64)):  # few rows, many, and the gradient
        weight = torch.randn(V, 4 * C, device=device)
        packed = ops.quantize_nf4(weight).rows(V) if format == "nf4" else ops.quantize_groups(weight, format)
        for rows in (1, 5, T):
            wide = torch.randn(rows, 4 * C, device=device, dtype=torch.bfloat16).requires_grad_()
            ops.quantized_linear(wide, *packed, format=format, group_size=size).sum().backward()
    ops.quantized_linear(
        torch.randn(T, 4 * C, device=device).requires_grad_(), *packed, format="nf4", group_size=64
    ).sum().backward()
    ops.sample(torch.randn(3, V, device=device), top_k=50, top_p=0.9, seed=1)


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
