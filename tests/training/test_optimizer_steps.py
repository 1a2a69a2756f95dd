"""Two updates of the trainer against steps written out by hand: clipping, decay, betas, Muon's momentum and scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gptfast.machine import choose_dtype
from gptfast.models import GPT, GPTConfig
from gptfast.training import TrainConfig, Trainer
from gptfast.training.optim import build_optimizers, parameters_of

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=23, dropout=0.0)
FAST_BFLOAT16 = choose_dtype()[0] == "bfloat16"
RATE, DECAY, BETA1, BETA2, EPSILON, MOMENTUM = 0.02, 4.0, 0.7, 0.8, 1e-8, 0.95


class Adam:
    """AdamW of one tensor (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), in float64."""

    def __init__(self) -> None:
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, p: Tensor, g: Tensor, rate: float, decay: float) -> Tensor:
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g**2
        m, v = self.m / (1 - BETA1**self.t), self.v / (1 - BETA2**self.t)
        return p - rate * decay * p - rate * m / (v.sqrt() + EPSILON)


class Muon:
    """Muon of one matrix (Jordan et al. 2024), with Nesterov's momentum, scaled to AdamW's size (arXiv 2502.16982)."""

    def __init__(self) -> None:
        self.buffer = 0.0

    def step(self, p: Tensor, g: Tensor, rate: float, decay: float) -> Tensor:
        self.buffer = MOMENTUM * self.buffer + (1 - MOMENTUM) * g
        update = _orthogonal((1 - MOMENTUM) * g + MOMENTUM * self.buffer)
        return p - rate * decay * p - rate * 0.2 * math.sqrt(max(p.shape)) * update


class Lion:
    """Lion of one tensor (Chen et al., arXiv 2302.06675, algorithm 2), in float64."""

    def __init__(self) -> None:
        self.m = 0.0

    def step(self, p: Tensor, g: Tensor, rate: float, decay: float) -> Tensor:
        update = torch.sign(BETA1 * self.m + (1 - BETA1) * g)
        self.m = BETA2 * self.m + (1 - BETA2) * g
        return p - rate * (update + decay * p)


def _orthogonal(g: Tensor) -> Tensor:
    """Five Newton-Schulz steps: singular values between about 0.7 and 1.2. In bfloat16, as torch's, where ours is torch's."""
    x = (g.T if g.shape[0] > g.shape[1] else g).to(torch.bfloat16 if FAST_BFLOAT16 else torch.float64)
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if g.shape[0] > g.shape[1] else x).double()


def gradients(model: GPT, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, in float32; by eager autograd through the model."""
    parameters = dict(model.named_parameters())
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    found = torch.autograd.grad(loss, list(parameters.values()))
    return {name: g.double() for name, g in zip(parameters, found, strict=True)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
@pytest.mark.parametrize("clip", [0.05, 0.0], ids=["clipped", "unclipped"])
def test_updates_are_those_of_the_formula(optimizer, clip, tmp_path):
    torch.manual_seed(0)
    model = GPT(SHAPE)
    with torch.no_grad():  # large enough for the decay to show, and no bias at 0, where none would
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    tokens = np.random.default_rng(1).integers(0, 23, 400).astype(np.uint16)
    config = TrainConfig(
        batch_size=3,
        max_steps=10,
        optimizer=optimizer,
        learning_rate=RATE,
        warmup_steps=4,
        weight_decay=DECAY,
        beta1=BETA1,
        beta2=BETA2,
        grad_clip=clip,
        dtype="float32",
        device="cpu",
    )
    trainer = Trainer(model, tokens, tokens, config, tmp_path / "run", progress=False)
    rules = {name: _rule(name, p, optimizer) for name, p in model.named_parameters()}
    assert any(isinstance(rule, Muon) for rule in rules.values()) == (optimizer == "muon")
    for step in range(2):
        before = {name: p.detach().double() for name, p in model.named_parameters()}
        found = gradients(model, *trainer.sampler.batch(step))
        record = trainer._update()
        norm = math.sqrt(sum(float((g**2).sum()) for g in found.values()))
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-4), "the norm before it is clipped"
        assert record["lr"] == pytest.approx(RATE * (step + 1) / 4)
        assert norm > 0.05, "the clip has to bind"
        largest = max(float(g.abs().max()) for g in found.values())
        scale = min(1.0, 0.05 / norm) if clip else 1.0
        for name, p in model.named_parameters():
            decay = DECAY if p.dim() >= 2 else 0.0
            expected = rules[name].step(before[name], scale * found[name], record["lr"], decay)
            moved = (expected - before[name]).abs().max().item()
            # Newton-Schulz rounds to bfloat16 in five steps: 2.1% of the update measured; float32 steps are exact to 1e-4
            tolerance = 0.05 if isinstance(rules[name], Muon) and FAST_BFLOAT16 else 2e-3
            # the gradient of the keys' bias is 0 up to rounding, and AdamW divides by it
            certain = found[name].abs() > 1e-4 * largest
            error = (p.detach().double() - expected)[certain].abs().max().item() if certain.any() else 0.0
            assert error <= tolerance * moved, f"{name}, step {step + 1}: {error:.3g} of a move of {moved:.3g}"


def _rule(name: str, p: Tensor, optimizer: str) -> Adam | Muon | Lion:
    if optimizer == "lion":
        return Lion()
    return Muon() if optimizer == "muon" and name.startswith("h.") and p.dim() == 2 else Adam()


def test_muon_without_fast_bfloat16_multiplies_in_fp32(monkeypatch):
    """Where torch's own, of bfloat16, takes ten times as long as the rest of a step; two steps are those of torch's."""
    steps = {}
    for dtype in ("bfloat16", "float32"):
        monkeypatch.setattr("gptfast.training.optim.choose_dtype", lambda device, dtype=dtype: (dtype, ""))
        torch.manual_seed(0)
        model = GPT(SHAPE)
        muon = build_optimizers(model, TrainConfig(optimizer="muon", learning_rate=0.1))[-1]
        assert (type(muon) is torch.optim.Muon) == (dtype == "bfloat16")
        before = [p.detach().clone() for p in parameters_of([muon])]
        ids = torch.arange(16).view(2, 8)
        for _ in range(2):
            model.zero_grad()
            model(ids, targets=ids)[1].backward()
            muon.step()
        steps[dtype] = [p.detach() - old for p, old in zip(parameters_of([muon]), before, strict=True)]
    for ours, theirs in zip(steps["float32"], steps["bfloat16"], strict=True):
        # Measured: 0.09. The iteration in bfloat16 is as far from one in float64, the one in fp32 is not (2e-3, above).
        assert (ours - theirs).norm() < 0.2 * theirs.norm()
