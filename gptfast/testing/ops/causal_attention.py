"""causal_attention: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast._schemas import AttentionOptions
from gptfast.ops.reference import visible_keys
from gptfast.testing.case import Case, Inputs, Spec


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    B, H, T, D = (c.dims[k] for k in "BHTD")
    S, K = c.dims.get("S", T), c.dims.get("K", H)
    if c.layout == "strided":  # one projection of q, k and v, as a model makes it
        x = torch.randn(B, max(T, S), H + 2 * K, D, generator=g).to(dtype)
        parts = zip(x.split([H, K, K], 2), (T, S, S), strict=True)
        found = [part[:, :n].transpose(1, 2) for part, n in parts]
    else:
        spread = c.dims.get("scores", 1) ** 0.5  # of the scores, some 4 times that at most
        sizes = (H, T, spread), (K, S, spread), (K, S, 1)
        found = [(torch.randn(B, h, n, D, generator=g) * f).to(dtype) for h, n, f in sizes]
    sinks = [torch.randn(H, generator=g).to(dtype) * 2] if c.dims.get("sinks") else []
    return *found, *sinks


def cost(c: Case, size: int) -> tuple[float, float]:
    B, H, T, D = (c.dims[k] for k in "BHTD")
    S, K = c.dims.get("S", T), c.dims.get("K", H)
    causal, window, lengths = (c.options.get(n) for n in ("causal", "window", "seq_lens"))
    visible = T * S - T * (T - 1) / 2 if causal is not False and T <= S else T * S
    if window and window < T == S:
        visible = T * window - window * (window - 1) / 2
    if lengths is not None and causal is False:
        visible = T * lengths.double().mean().item()
    return 4.0 * B * H * visible * D, B * D * (2 * H * T + 2 * K * S) * size


def case(
    B: int,
    H: int,
    T: int,
    D: int,
    S: int | None = None,
    layout: str = "contiguous",
    K: int | None = None,
    sinks: bool = False,
    **options: Any,
) -> Case:
    """K: heads of k and v, which groups of query heads share; None: as many as q has."""
    dims = {"B": B, "H": H, "T": T, **({} if S is None else {"S": S}), "D": D, **({"sinks": 1} if sinks else {})}
    if K is not None:
        dims["K"], options = K, {**options, "enable_gqa": True}
    return Case("causal_attention", dims, options, layout)


def peer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    causal: bool = True,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    """SDPA, with a mask where there is more than causality to say. A sink is one more key, whose value is 0."""
    plain = sinks is None and all(options.get(name) is None for name in ("window", "seq_lens", "left_pad"))
    if plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout_p, enable_gqa=enable_gqa)
    lengths = options.get("seq_lens"), options.get("left_pad")
    wanted = AttentionOptions(lengths[0], causal=causal, window=options.get("window") or 0, left_pad=lengths[1])
    mask = visible_keys(q.shape[2], k.shape[2], wanted)
    if sinks is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        mask = torch.cat([mask.expand(-1, q.shape[1], -1, -1), sinks[:, None, None].expand(1, -1, q.shape[2], 1)], -1)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, enable_gqa=enable_gqa)


SPEC = Spec(
    cases=[
        case(2, 3, 256, 64),
        case(1, 2, 200, 64, layout="strided"),
        case(1, 2, 77, 64, causal=False),
        case(2, 2, 129, 128, dropout_p=0.1, seed=2**63 + 5, offset=7),
        case(1, 2, 333, 48, layout="strided", dropout_p=0.2, seed=3),
        case(1, 2, 1, 64),
        case(1, 1, 67, 80, causal=False, dropout_p=0.3, seed=9, offset=2**32 - 1),
        case(2, 2, 113, 59, layout="strided", dropout_p=0.1),
        case(1, 1, 65, 1),
        case(1, 1, 70, 256),
        case(1, 2, 5, 64, S=200),
        case(2, 2, 1, 33, S=77),
        case(1, 2, 100, 16, S=40),
        case(2, 1, 150, 64, window=17),
        case(1, 1, 300, 32, window=64, dropout_p=0.1, seed=1),
        case(3, 2, 90, 64, seq_lens=torch.tensor([90, 0, 37])),
        case(2, 2, 70, 64, S=130, causal=False, seq_lens=torch.tensor([101, 5])),
        case(1, 2, 200, 64, cu_seqlens=torch.tensor([0, 13, 13, 100, 200])),
        case(1, 2, 150, 40, layout="strided", cu_seqlens=torch.tensor([0, 100, 150]), window=9),
        case(1, 2, 64, 64, softmax_scale=-0.3),
        case(1, 2, 64, 64, softmax_scale=0.0, dropout_p=1.0),
        case(0, 2, 8, 16),
        case(1, 2, 0, 16, S=5),
        case(1, 2, 3, 16, S=0),
        case(2, 4, 100, 64, K=2),
        case(1, 6, 90, 128, K=2, layout="strided", dropout_p=0.2, seed=11, window=33),
        case(2, 5, 67, 40, K=1, S=90, causal=False, dropout_p=0.1, seed=4, seq_lens=torch.tensor([90, 21])),
        case(1, 12, 1, 64, K=4, S=333),
        case(3, 3, 7, 33, K=1, S=150, layout="strided", softmax_scale=-0.2, seq_lens=torch.tensor([0, 150, 77])),
        case(1, 8, 130, 24, K=4, layout="strided", cu_seqlens=torch.tensor([0, 50, 51, 130]), dropout_p=0.3),
        case(1, 4, 100, 16, K=2, S=40, window=30),
        case(1, 8, 33, 256, K=2, causal=False),
        case(1, 2, 19, 8, K=2),
        case(1, 4, 0, 16, K=2, S=5),
        case(2, 4, 3, 16, K=2, S=0),
        case(2, 3, 130, 64, sinks=True),
        case(1, 4, 150, 48, K=2, layout="strided", sinks=True, window=20, dropout_p=0.2, seed=5),
        case(1, 8, 1, 64, K=2, S=333, sinks=True, window=128),
        case(1, 2, 120, 33, sinks=True, cu_seqlens=torch.tensor([0, 13, 13, 120])),
        case(
            2,
            2,
            40,
            16,
            S=50,
            sinks=True,
            causal=False,
            left_pad=torch.tensor([50, 7]),
            seq_lens=torch.tensor([50, 33]),
        ),
        case(1, 2, 3, 16, S=0, sinks=True),
        case(1, 2, 0, 16, S=5, sinks=True),
        case(2, 2, 129, 64, softcap=1.5),
        case(1, 4, 90, 40, K=2, layout="strided", softcap=3.0, dropout_p=0.1, seed=2, window=33),
        case(2, 2, 3, 64, S=300, softcap=20.0),
        case(1, 4, 70, 24, K=2, softcap=2.0, sinks=True, softmax_scale=-0.5, cu_seqlens=torch.tensor([0, 31, 70])),
        case(1, 2, 33, 16, softcap=2.0, softmax_scale=0.0),
        case(
            3,
            2,
            100,
            64,
            causal=False,
            left_pad=torch.tensor([0, 61, 99]),
            seq_lens=torch.tensor([40, 100, 99]),
            dropout_p=0.1,
        ),
        case(3, 2, 70, 64, left_pad=torch.tensor([5, 70, 64], dtype=torch.int32), window=30),
        Case("causal_attention", {"B": 4, "H": 12, "T": 1024, "D": 64}, bench=True),
        Case(
            "causal_attention",
            {"B": 4, "H": 12, "T": 1024, "D": 64},
            {"dropout_p": 0.1},
            bench=True,
            slow_reference=True,
        ),
        Case(
            "causal_attention",
            {"B": 1, "H": 32, "T": 1024, "D": 128, "K": 8},
            {"enable_gqa": True},
            bench=True,
            slow_reference=True,
        ),
        Case(  # BERT base: every query sees the real keys of its row
            "causal_attention",
            {"B": 8, "H": 12, "T": 512, "D": 64},
            {"causal": False, "dropout_p": 0.1, "seq_lens": torch.tensor([512, 320, 505, 128, 512, 401, 77, 256])},
            bench=True,
            slow_reference=True,
        ),
        Case(  # a banded layer of gpt-oss
            "causal_attention",
            {"B": 1, "H": 64, "T": 1024, "D": 64, "K": 8, "sinks": 1},
            {"enable_gqa": True, "window": 128},
            bench=True,
            slow_reference=True,
        ),
    ],
    make=make,
    cost=cost,
    peer=("SDPA", peer),
    backward_flops=2.5,
    floors={
        # 2.5 where eager is MKL on AMD, on the emulated CUDA kernels alone: tf32 products of 22 bits; the CPU's need 0
        torch.float32: (3.5, 0.0),
        torch.bfloat16: (0.8, 1.1),  # 0.53, 0.71: probabilities and dS are multiplied as bf16
        torch.float16: (0.8, 1.1),  # 0.51, 0.63: the same; on the CPU the stored result alone
    },
)
