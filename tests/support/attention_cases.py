"""Calls of causal_attention for which its CUDA kernels have code paths that others do not have."""

from __future__ import annotations

import torch

from gptfast.testing import Case


def attention(
    T: int,
    D: int,
    S: int | None = None,
    B: int = 1,
    H: int = 1,
    layout: str = "contiguous",
    K: int = 0,
    sinks: bool = False,
    **options,
) -> Case:
    dims = {"B": B, "H": H, "T": T, **({} if S is None else {"S": S}), "D": D, **({"sinks": 1} if sinks else {})}
    if K:
        dims["K"], options = K, {**options, "enable_gqa": True}
    return Case("causal_attention", dims, options, layout)


LONG = [  # the rings of buffers go round more than once
    attention(130, 64, S=700, causal=False),
    attention(70, 64, S=700, dropout_p=0.1, seed=5),
    attention(140, 128, S=560, causal=False, dropout_p=0.2),
    attention(520, 64, window=300),
    attention(300, 128, cu_seqlens=torch.tensor([0, 130, 131, 300])),
    attention(130, 128, H=3, K=1, dropout_p=0.1, seed=2),
    attention(200, 64, H=4, K=2, layout="strided"),
    attention(200, 64, H=4, K=2, sinks=True, window=130, dropout_p=0.1, seed=3),
    attention(150, 128, S=300, softcap=3.0, sinks=True),
    attention(300, 64, B=3, causal=False, left_pad=torch.tensor([0, 140, 250]), seq_lens=torch.tensor([120, 300, 250])),
    attention(280, 128, left_pad=torch.tensor([131]), window=100),
]
FEW_QUERIES = [  # decode_attention
    attention(1, 64, S=700, H=3),
    attention(1, 33, S=600, layout="strided", seq_lens=torch.tensor([555])),
    attention(6, 128, S=520, window=300),
    attention(16, 256, S=515, causal=False),
    attention(5, 12, S=800, B=2, causal=False, seq_lens=torch.tensor([0, 3])),
    attention(3, 64, S=512, softmax_scale=0.0),
    attention(1, 128, S=520, H=5, K=1, layout="strided", seq_lens=torch.tensor([513])),
    attention(5, 64, S=530, H=3, K=1),
    attention(1, 64, S=600, H=8, K=1, sinks=True, window=128),
    attention(3, 40, S=700, B=2, sinks=True, left_pad=torch.tensor([700, 13])),
    attention(2, 128, S=530, H=2, softcap=2.0),
    attention(1, 8, B=1, H=1, S=8600),  # more splits than a block has threads
]
MODE_CASES = [
    attention(3, 64, S=600),
    attention(200, 64, layout="strided", dropout_p=0.1),
    attention(129, 128, window=70),
    attention(67, 80, S=90, causal=False, dropout_p=0.3),
    attention(40, 59, seq_lens=torch.tensor([31])),
    attention(70, 64, S=560, dropout_p=0.2),
    attention(70, 64, S=150, H=4, K=2, dropout_p=0.2),
    attention(130, 64, H=2, sinks=True, softcap=2.0, dropout_p=0.2),
]
