"""Host time of a training step: a GPT so narrow that its kernels cost next to nothing, beside the same model in torch's layers.

    OMP_NUM_THREADS=1 python benchmarks/bench_host.py [--rows 8] [--dropout 0.0] [--rounds 60]

What is left is Python, checks, autograd and the dispatcher: what a GPU waits for where its kernels are shorter. With fewer than
16 rows products are `F.linear`, as on a GPU. Ours and the peer take turns; times are medians over the rounds, one step a turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptfast

LAYERS, C, H, V = 12, 32, 2, 256
PHASES = ("forward", "backward", "optimizer")


class PeerBlock(nn.Module):
    """A block of nanoGPT: layers of torch, SDPA."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.gelu, self.c_proj = nn.Linear(C, 4 * C), nn.GELU(approximate="tanh"), nn.Linear(4 * C, C)
        self.attn_drop, self.mlp_drop, self.p = nn.Dropout(dropout), nn.Dropout(dropout), dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, H, C // H).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        x = x + self.attn_drop(self.attn_proj(y.transpose(1, 2).contiguous().view(B, T, C)))
        return x + self.mlp_drop(self.c_proj(self.gelu(self.c_fc(self.ln_2(x)))))


class Peer(nn.Module):
    """nanoGPT."""

    def __init__(self, block_size: int, dropout: float) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(V, C), nn.Embedding(block_size, C), nn.Dropout(dropout)
        self.h = nn.ModuleList(PeerBlock(dropout) for _ in range(LAYERS))
        self.ln_f, self.lm_head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1))


def stepper(model: nn.Module, rows: int, bf16: bool) -> Callable[[], tuple[float, ...]]:
    """A function that makes a step and returns the seconds of its phases."""
    ids = torch.randint(V, (1, rows), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> tuple[float, ...]:
        times = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(ids, ids)[1]
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return tuple(after - before for before, after in pairwise(times))

    return step


def compare(rows: int, dropout: float, bf16: bool, rounds: int) -> None:
    sizes: dict[str, Any] = {"n_layer": LAYERS, "n_embd": C, "n_head": H, "vocab_size": V, "block_size": rows}
    torch.manual_seed(0)
    models = {
        "gptfast": gptfast.GPT(gptfast.GPTConfig(**sizes, dropout=dropout)).train(),
        "torch": Peer(rows, dropout).train(),
    }
    steps = {name: stepper(model, rows, bf16) for name, model in models.items()}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for n in range(rounds + 5):
        for name, step in steps.items():
            times = step()
            if n >= 5:
                found[name].append(times)
    for name, times in found.items():
        phases = [statistics.median(x) * 1e6 for x in zip(*times, strict=True)]
        both = statistics.median(sum(x[:2]) for x in times) * 1e6
        text = ", ".join(f"{phase} {us:5.0f}" for phase, us in zip(PHASES, phases, strict=True))
        print(
            f"{rows} rows, dropout {dropout}, {'bf16' if bf16 else 'fp32'}: {name:8} {text}; forward + backward {both:5.0f} us"
        )
    ratio = statistics.median(sum(b[:2]) / sum(a[:2]) for a, b in zip(found["gptfast"], found["torch"], strict=True))
    print(f"    torch's forward + backward takes {ratio:.2f}x the time of ours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16], help="tokens of the batch")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    for rows in options.rows:
        for dropout in options.dropout:
            for bf16 in (False, True):
                compare(rows, dropout, bf16, options.rounds)
