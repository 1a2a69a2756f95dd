"""Whole models as a GPU runs them, without one: on the emulated CUDA kernels; and on fake CUDA tensors, which have shapes,
dtypes and devices, but no values."""

from __future__ import annotations

import pytest
import torch

import gptfast
from tests.support.cuda_models import tiny


def loss_and_gradients(backend: str, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    model = tiny(**options).train()
    ids = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))
    with gptfast.backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"attention_pattern": "alternating", "window": 5}, {"norm_position": "post"}],
    ids=["dropout", "windows", "gpt1"],
)
def test_training_step(options, dtype, emu):
    """Loss and every gradient are the CPU kernels', with the same dropout masks; and they repeat bit for bit."""
    here, again, there = (loss_and_gradients(name, dtype, **options) for name in ("emu", "emu", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(here, again, strict=True))
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 20, "seed": 3}, {"top_p": 0.8, "seed": 4}, {"num_beams": 3}],
)
def test_generation(options, emu):
    """Prompts of several lengths; the tokens are the CPU kernels'."""
    model = tiny().eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    results = []
    for name in ("emu", "cpu"):
        with gptfast.backend(name):
            results.append(model.generate(prompts, max_new_tokens=6, **options))
    assert results[0] == results[1]


def test_nothing_waits_for_the_gpu(on_fake_gpu):
    """A value that Python asked for, as by `.item()`, would raise here."""
    ids, targets = (torch.empty(3, 20, dtype=torch.int64, device="cuda") for _ in range(2))
    logits, loss = on_fake_gpu.eval()(ids, targets)
    _, training_loss = on_fake_gpu.train()(ids, targets)
    tokens = gptfast.ops.sample(logits.flatten(0, 1), top_k=5)
    for x, shape, kind in (
        (logits, (3, 20, 61), torch.float32),
        (loss, (), torch.float32),
        (training_loss, (), torch.float32),
        (tokens, (60,), torch.int64),
    ):
        assert (tuple(x.shape), x.dtype, x.device.type) == (shape, kind, "cuda")


def test_the_loss_is_scaled_on_the_gpu(on_fake_gpu):
    """The upstream gradient multiplies the gradients where it is."""
    hidden, weight = (torch.empty(n, 32, dtype=torch.bfloat16, device="cuda") for n in (7, 61))
    from gptfast.ops.linear_cross_entropy import _scaled

    dhidden, dweight = _scaled(torch.empty((), device="cuda"), hidden, weight, hidden, weight.float())
    assert dhidden.dtype == dweight.dtype == torch.bfloat16
