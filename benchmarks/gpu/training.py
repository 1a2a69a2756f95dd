"""A training step of GPT-2 124M: forward, backward and AdamW in bfloat16 autocast; tokens/s and model FLOP utilisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptfast

from .timing import Bench, Row, Run, that_run

# Dense bf16 of the data sheets, without sparsity. The first name that occurs in the GPU's counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}


class PlainBlock(nn.Module):
    def __init__(self, config: gptfast.GPTConfig, attention: str):
        super().__init__()
        C = config.n_embd
        self.heads, self.attention = config.n_head, attention
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.c_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.c_proj(self.attend(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.attention == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


class PlainGPT(nn.Module):
    """GPT-2 as PyTorch users write it, without dropout: nn.Linear, nn.LayerNorm, SDPA or plain attention."""

    def __init__(self, config: gptfast.GPTConfig, attention: str):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.Sequential(*(PlainBlock(config, attention) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        logits = self.lm_head(self.ln_f(self.h(x)))
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def configuration(bench: Bench) -> tuple[gptfast.GPTConfig, int]:
    """The model, and the rows of a batch."""
    if bench.tiny:
        return gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=61, dropout=0.0), 2
    return gptfast.GPTConfig.preset("gpt2", dropout=0.0), 16


def stepper(bench: Bench, make: Callable[[], nn.Module], compiled: bool) -> Run:
    config, rows = configuration(bench)
    model = make().to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(config.vocab_size, (rows, config.block_size + 1), device=bench.device)
    how: dict[str, Any] = {"backend": "eager"} if bench.tiny else {}  # on trial a compiler that changes nothing
    run = torch.compile(model, **how) if compiled else model
    backend = bench.backend if not bench.real else "auto"

    def step() -> None:
        with gptfast.backend(backend), torch.autocast(bench.device, torch.bfloat16):
            _, loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def flops_per_token(config: gptfast.GPTConfig) -> float:
    """6 a weight of a product, and causal attention's 6 T C a layer (Chowdhery et al., PaLM, appendix B; half masked)."""
    C = config.n_embd
    return 6 * (12 * config.n_layer * C * C + C * config.vocab_size) + 6 * config.n_layer * config.block_size * C


def plan(bench: Bench) -> list[str]:
    return ["training step", "training step, compiled"]


def measure(bench: Bench) -> Iterator[Row]:
    """First what takes no compiling, in a row of its own."""
    for compiled in (False, True):
        yield compare(bench, compiled)


def compare(bench: Bench, compiled: bool) -> Row:
    config, rows = configuration(bench)
    torch.set_float32_matmul_precision("high")
    makers: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        "gptfast": (lambda: gptfast.GPT(config), False),
        "eager attention": (lambda: PlainGPT(config, "eager"), False),
        "SDPA": (lambda: PlainGPT(config, "sdpa"), False),
    }
    if compiled:
        padded = replace(config, vocab_size=-(-config.vocab_size // 64) * 64)
        makers = {
            "gptfast": (lambda: gptfast.GPT(config), False),
            "gptfast + torch.compile": (lambda: gptfast.GPT(config), True),
            "SDPA + torch.compile": (lambda: PlainGPT(config, "sdpa"), True),
            "SDPA + torch.compile, padded vocabulary": (lambda: PlainGPT(padded, "sdpa"), True),  # as nanoGPT has it
        }
    runs, refused = that_run((n, lambda m=m, c=c: stepper(bench, m, c)) for n, (m, c) in makers.items())
    times = bench.milliseconds(runs, rounds=10)
    speeds = {name: rows * config.block_size / ms * 1e3 for name, ms in times.items()}
    gpu = torch.cuda.get_device_name() if bench.real else "CPU"
    peak = next((p for name, p in PEAK_TFLOPS.items() if name in gpu), None)
    percent = 100 * flops_per_token(config) / (peak * 1e12) if peak else None
    print(f"\n{'training step, bfloat16':32}{'tokens/s':>12}{'MFU %':>8}{'gptfast is':>12}")
    for name, speed in speeds.items():
        utilisation = "-" if percent is None else f"{speed * percent:.1f}"
        ratio = f"{times[name] / times['gptfast']:.2f}x" if "gptfast" in times else "-"
        print(f"{name:32}{speed:>12,.0f}{utilisation:>8}{ratio:>12}", flush=True)
    for name, reason in refused.items():
        print(f"{name:32}did not run: {reason}")
    utilisations = {name: speed * percent for name, speed in speeds.items()} if percent else {}
    what = "training step, compiled" if compiled else "training step"
    row = {"what": what, "ms": times, "tokens/s": speeds, "MFU %": utilisations, "refused": refused, **bench.spread}
    if "gptfast" in runs:
        row |= bench.sustained(runs["gptfast"], times["gptfast"])
    return row
