"""The measured speed of a training step on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from gptfast.machine import choose_dtype, resolve_device
from gptfast.models import GPT, GPTConfig
from gptfast.training.config import TrainConfig
from gptfast.training.optim import build_optimizers


def step_seconds(config: GPTConfig, batch_size: int, device: str = "auto", times: int = 4) -> float:
    """Seconds of a training step: forward, backward and update, in the dtype that training chooses. The least of some.

    Args:
        config: of the model; a row has its block_size tokens.
        batch_size: rows.
        times: steps that are timed, after one that is not.
    """
    place = resolve_device("LadderOptions", device)
    dtype = getattr(torch, choose_dtype(place)[0])
    with torch.random.fork_rng(devices=[]):
        model = GPT(config).to(place)
    optimizers = build_optimizers(model, TrainConfig(learning_rate=1e-6))
    ids = torch.arange(batch_size * config.block_size, device=place).view(batch_size, -1) % config.vocab_size
    return min([_step(model, optimizers, ids, dtype) for _ in range(times + 1)][1:])


def _step(model: GPT, optimizers: list[Any], ids: torch.Tensor, dtype: torch.dtype) -> float:
    start = time.perf_counter()
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        model(ids, ids)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start


def flops_per_second(device: str = "auto") -> float:
    """FLOPs a second of a training step of a GPT of 4 million parameters."""
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=4096, dropout=0.0)
    with torch.device("meta"):
        per_token = GPT(config).flops_per_token(config.block_size)
    return per_token * 8 * config.block_size / step_seconds(config, 8, device, times=2)
