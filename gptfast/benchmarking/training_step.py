"""Our training step beside PyTorch's, in one run: the same weights, batch, dtype and optimizer.  B T C H D V."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.backend import backend, cpu_isa
from gptfast.machine import cpu_name
from gptfast.models import GPT, GPTConfig
from gptfast.training.config import TrainConfig
from gptfast.training.optim import build_optimizers

LossFn = Callable[[GPT, Tensor, Tensor], Tensor]
_TOLERANCE = 0.02  # nats, between the losses of two implementations; bfloat16 keeps 8 bits


@dataclass(frozen=True)
class StepComparison:
    """Our training step beside those of peers.

    milliseconds: medians of one training step, ours first. ratios: of each peer's time to ours, the median over
    the rounds; above 1 means that ours is faster. losses: of the first step, which must agree."""

    machine: str
    workload: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    losses: dict[str, float]

    def lines(self) -> list[str]:
        """The comparison as text; one that we lose reads like one that we win."""
        rows = [f"{name:<28}{self.milliseconds[name]:9.1f} ms a step" for name in self.milliseconds]
        for n, name in enumerate(self.milliseconds):
            if name in self.ratios:
                rows[n] += f", {self.ratios[name]:.2f}x the time of gptfast"
        return [f"one training step of {self.workload}", f"on {self.machine}, in turns, medians:", *rows]


def gptfast_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Loss through the fused ops."""
    return model(x, y)[1]


def eager_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Loss of the same model with every op in eager PyTorch, attention by its formula."""
    with backend("eager"):
        return model(x, y)[1]


def torch_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Loss as a plain PyTorch GPT-2 computes it: F.layer_norm, F.linear, F.gelu, F.cross_entropy, and
    F.scaled_dot_product_attention, torch's own fused attention. Without dropout."""
    c, (B, T) = model.config, x.shape
    norm = lambda h, ln: F.layer_norm(h, (c.n_embd,), ln.weight, ln.bias, ln.eps)  # noqa: E731
    linear = lambda h, layer: F.linear(h, layer.weight, layer.bias)  # noqa: E731
    h = F.embedding(x, model.wte.weight) + model.wpe.weight[:T]
    blocks: Any = model.h
    for block in blocks:
        qkv = linear(norm(h, block.ln_1), block.attn.c_attn).view(B, T, 3, c.n_head, c.head_dim)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + linear(a.transpose(1, 2).reshape(B, T, c.n_embd), block.attn.c_proj)
        m = F.gelu(linear(norm(h, block.ln_2), block.mlp.c_fc), approximate="tanh")
        h = h + linear(m, block.mlp.c_proj)
    logits = linear(norm(h, model.ln_f), model.lm_head)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


PEERS: dict[str, LossFn] = {
    "gptfast": gptfast_loss,
    "PyTorch, fused attention": torch_loss,
    "PyTorch, eager attention": eager_loss,
}


def compare_step(
    config: GPTConfig, batch_size: int, *, block_size: int | None = None, dtype: str = "float32", rounds: int = 10
) -> StepComparison:
    """Time forward, backward, clipping and AdamW of each implementation in turns (A B C A B C ...), after one round to
    warm up, and check that their losses agree.

    Args:
        config: of a pre-norm GPT with dense attention and learned positions; its dropout is set to 0.
        batch_size: B.
        block_size: T; None: the config's.
        dtype: "float32" or "bfloat16" (autocast, as in training).
        rounds: how often each one is timed.
    Raises:
        ValueError: a config that the plain implementation does not cover.  RuntimeError: the losses differ.
    """
    as_gpt2 = {"norm_position": "pre", "final_norm": True, "attention_pattern": "dense"}
    for name, value in {**as_gpt2, "position_embedding": "learned", "activation": "gelu_tanh"}.items():
        if getattr(config, name) != value:
            raise ValueError(f"compare_step: {name} is {getattr(config, name)!r}; expected {value!r}, as in GPT-2")
    torch.manual_seed(0)
    T = block_size or config.block_size
    x, y = torch.randint(config.vocab_size, (2, batch_size, T), device="cpu").unbind()
    first = GPT(config.with_dropout(0.0)).train()
    steps = {name: _stepper(copy.deepcopy(first), loss, x, y, dtype) for name, loss in PEERS.items()}
    losses = {name: step() for name, step in steps.items()}  # also warms up
    if max(losses.values()) - min(losses.values()) > _TOLERANCE:
        raise RuntimeError(f"compare_step: the losses of one batch differ: {losses}; the times would mean nothing")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_milliseconds(step))
    ours = times["gptfast"]
    ratios = {
        name: statistics.median(t / o for t, o in zip(values, ours, strict=True))
        for name, values in times.items()
        if name != "gptfast"
    }
    shape = f"{config.n_layer} layers of {config.n_embd}, {config.n_head} heads, vocabulary {config.vocab_size}"
    return StepComparison(
        machine=f"{cpu_name()}, {torch.get_num_threads()} threads, {cpu_isa() or 'no compiled ops'}, torch {torch.__version__}",
        workload=f"{shape}, {batch_size} rows of {T} tokens, {dtype}",
        milliseconds={name: statistics.median(values) for name, values in times.items()},
        ratios=ratios,
        losses=losses,
    )


def _stepper(model: GPT, loss_fn: LossFn, x: Tensor, y: Tensor, dtype: str) -> Callable[[], float]:
    """A function that trains `model` one step and returns the loss."""
    (optimizer,) = build_optimizers(model, TrainConfig())
    parameters = list(model.parameters())

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = loss_fn(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _milliseconds(step: Callable[[], float]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3
