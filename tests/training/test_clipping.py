"""Clipping in the optimizer's own pass, and steps whose numbers the host looks at later."""

from __future__ import annotations

import math

import pytest
import torch

from gptfast.models import GPT
from gptfast.training import read_checkpoint
from gptfast.training.clipping import clipped_step, gradient_norm
from gptfast.training.log import read_log
from gptfast.training.optim import build_optimizers, parameters_of
from tests.support.training import MUON, QUICK, SHAPE, make_trainer, timeless


def stepped(config, limit: float, clip) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(1)
    model = GPT(SHAPE)
    optimizers = build_optimizers(model, config)
    for n in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + n))
        norm = clip(optimizers, limit)
    return dict(model.named_parameters()), float(norm)


def ours(optimizers, limit):
    norm = gradient_norm(parameters_of(optimizers))
    clipped_step(optimizers, norm, limit)
    return norm


def torchs(optimizers, limit):
    norm = torch.nn.utils.clip_grad_norm_(parameters_of(optimizers), limit or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    return norm


@pytest.mark.parametrize("limit", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_clipped_step_is_that_of_clip_grad_norm(optimizer, limit):
    config = MUON.replace(optimizer=optimizer)
    (got, norm), (want, wanted) = stepped(config, limit, ours), stepped(config, limit, torchs)
    assert norm == wanted
    for name in want:  # the scale is a product there and a quotient here: one rounding of the gradient
        torch.testing.assert_close(got[name], want[name], rtol=2e-5, atol=1e-8, msg=name)
    if limit != 1.0:
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_guarded_step_that_is_not_finite_leaves_the_weights():
    model = GPT(SHAPE)
    (optimizer,) = build_optimizers(model, QUICK)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    clipped_step([optimizer], gradient_norm(parameters_of([optimizer])), 1.0, guarded=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(TypeError, match="guarded needs AdamW alone"):
        clipped_step(build_optimizers(model, MUON), torch.tensor(1.0), 1.0, guarded=True)


def test_looking_a_step_later_changes_nothing_but_when_the_run_ends(tmp_path):
    """What a GPU does: loss and norm are not waited for. The step after one that is not finite is made and thrown away."""
    config = QUICK.replace(log_every=5, eval_every=6)
    make_trainer(tmp_path / "now", config).train()
    later = make_trainer(tmp_path / "later", config)
    later._looks_later = lambda norm: True
    later.train()
    assert timeless(tmp_path / "now") == timeless(tmp_path / "later")
    assert later.state.recent == read_checkpoint(tmp_path / "now" / "last").state.recent
    trainer = make_trainer(tmp_path / "nan", config)
    trainer._looks_later = lambda norm: True
    gradients, weights = trainer.objective.add_gradients, {}

    def broken(*args):
        weights[trainer.state.step] = trainer.model.wte.weight.detach().clone()
        figures = gradients(*args)
        if trainer.state.step == 7:
            trainer.model.wte.weight.grad.fill_(math.nan)
        return figures

    trainer.objective.add_gradients = broken
    with pytest.raises(RuntimeError, match=r"gradient nan at step 8, .*bad-step-000008"):
        trainer.train()
    assert list(weights) == list(range(9)) and torch.equal(weights[7], weights[8])
    assert torch.equal(trainer.model.wte.weight, weights[7])
    assert [r["step"] for r in read_log(tmp_path / "nan" / "log.jsonl")] == [1, 5, 6]
