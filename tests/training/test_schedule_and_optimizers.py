"""TrainConfig, the learning rate schedule, optimizers and gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from gptfast.models import GPT
from gptfast.training import TrainConfig, accumulate_gradients
from gptfast.training.optim import build_optimizers, parameters_of
from gptfast.training.schedule import learning_rate
from tests.support.training import MUON, QUICK, SHAPE, make_trainer


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected at least 1"),
        ({"grad_accum": 2.0}, TypeError, "grad_accum is 2.0; expected an int"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0.0; expected a number > 0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate is nan"),
        ({"beta2": 1.0}, ValueError, r"beta2 is 1.0; expected a number in \[0, 1\)"),
        ({"min_lr": 1.0}, ValueError, "min_lr is 1.0 but learning_rate is 0.001"),
        ({"max_steps": None}, ValueError, "max_steps and max_minutes are both None"),
        ({"max_minutes": -1}, ValueError, "max_minutes is -1; expected a number > 0"),
        ({"dtype": "float16"}, ValueError, "dtype is 'float16'; expected one of auto, float32, bfloat16"),
        ({"optimizer": "sgd"}, ValueError, "optimizer is 'sgd'; expected one of adamw, muon, lion"),
        ({"device": 0}, TypeError, "device is 0; expected a str"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808"),
        ({"steps": 5}, TypeError, "TrainConfig has no field 'steps'"),
    ],
)
def test_train_config_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        TrainConfig().replace(**changes)


def test_learning_rate_rises_linearly_then_falls_as_half_a_cosine():
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=24)
    rates = [learning_rate(step, config, 24) for step in range(30)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.6)  # half way
    assert rates[9] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(a > b for a, b in pairwise(rates[4:25]))
    assert rates[24:] == [0.2] * 6


@pytest.mark.parametrize(
    ("changes", "step", "total", "expected"),
    [
        ({}, 0, 2000, 1e-3 / 100),  # 100 steps of warm-up
        ({}, 0, 50, 1e-3 / 5),  # a tenth of 50
        ({"warmup_steps": 0}, 0, 50, 1e-3),
        ({}, 1999, math.inf, 1e-3),  # the end is not known yet
        ({}, 2000, 2000, 1e-4),
        ({"lr_decay_steps": 1000}, 1000, 2000, 1e-4),
        ({"lr_decay_steps": 4000, "warmup_steps": 0}, 2000, 2000, 5.5e-4),
        ({"schedule": "linear", "warmup_steps": 0}, 500, 2000, 7.75e-4),
        ({"schedule": "wsd"}, 1620, 2000, 1e-3),  # the last fifth of the 1900 steps after the warm-up begins here
        ({"schedule": "wsd"}, 1810, 2000, 5.5e-4),
        ({"schedule": "wsd"}, 2000, 2000, 1e-4),
        ({"schedule": "wsd"}, 1999, math.inf, 1e-3),
    ],
)
def test_learning_rate_defaults(changes, step, total, expected):
    assert learning_rate(step, TrainConfig(**changes), total) == pytest.approx(expected)


def test_matrices_decay_and_vectors_do_not():
    model = GPT(SHAPE)
    model.h[0].attn.c_attn.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    (optimizer,) = build_optimizers(model, TrainConfig(weight_decay=0.3))
    decayed, others = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    assert {n.split(".")[-2] for n in decayed} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert "h.0.attn.c_attn.weight" not in decayed
    assert all(n.endswith("bias") or ".ln_" in n or n.startswith("ln_f") for n in others)
    assert len(decayed) + len(others) == len(names) - 1
    assert len(set(decayed)) == len(decayed)  # the tied head is wte, once
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["fused"] and g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPT(SHAPE)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = ([names[id(p)] for p in parameters_of([o])] for o in build_optimizers(model, MUON))
    assert sorted(adamw + muon) == sorted(names.values())
    assert {n.split(".")[-2] for n in muon} == {"c_attn", "c_proj", "c_fc"}
    assert not [n for n in muon if n.endswith("bias")]


def test_a_frozen_model_has_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad=True"):
        build_optimizers(GPT(SHAPE).requires_grad_(False), TrainConfig())


def _gradients(batches: list) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(1)
    model = GPT(SHAPE.with_dropout(0.0)).train()
    loss = accumulate_gradients(model, batches)
    return loss, [p.grad for p in model.parameters()]


def test_accumulation_weighs_by_targets_so_that_the_split_into_batches_does_not_matter():
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randint(SHAPE.vocab_size, (2, 8, 16), generator=generator).unbind()
    for row, kept in enumerate((16, 1, 3, 16, 0, 0, 2, 9)):  # two rows, and one batch, count nothing
        y[row, kept:] = -100
    loss, expected = _gradients([(x, y)])
    split_loss, split = _gradients(list(zip(x.split(2), y.split(2), strict=True)))
    assert split_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(split, expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="every target is -100"):
        _gradients([(x, torch.full_like(y, -100))])


def test_grad_accum_sees_the_same_rows_as_a_larger_batch(tmp_path):
    shape = SHAPE.with_dropout(0.0)
    whole = make_trainer(tmp_path / "a", QUICK.replace(batch_size=8, grad_accum=1), shape)
    parts = make_trainer(tmp_path / "b", QUICK.replace(batch_size=2, grad_accum=4), shape)
    whole.train(), parts.train()
    torch.testing.assert_close(dict(whole.model.state_dict()), dict(parts.model.state_dict()), atol=2e-5, rtol=1e-3)
