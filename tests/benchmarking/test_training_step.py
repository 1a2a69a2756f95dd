"""The comparison of a training step with eager PyTorch."""

from __future__ import annotations

import pytest
import torch

from gptfast.benchmarking.training_step import compare_step, eager_loss, gptfast_loss, torch_loss
from gptfast.models import GPT
from tests.support.training import SHAPE


def test_the_step_that_is_compared_is_the_same_computation():
    model = GPT(SHAPE.with_dropout(0.0)).train()
    x, y = torch.randint(SHAPE.vocab_size, (2, 3, 16)).unbind()
    losses = [loss(model, x, y) for loss in (gptfast_loss, torch_loss, eager_loss)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads[other], grads[0], atol=1e-5, rtol=1e-3)


def test_compare_step_reports_every_implementation():
    comparison = compare_step(SHAPE, 2, rounds=2)
    assert list(comparison.milliseconds) == ["gptfast", *comparison.ratios]
    assert len(comparison.lines()) == 5
    with pytest.raises(ValueError, match="norm_position is 'post'; expected 'pre', as in GPT-2"):
        compare_step(SHAPE.replace(norm_position="post", final_norm=False), 2)
