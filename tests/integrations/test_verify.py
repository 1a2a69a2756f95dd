"""What `accelerate` is given besides the model: batches to verify with, models and versions that are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptfast
from gptfast.integrations.patch import _check_version
from tests.support.hf_models import hf_model, padded

IDS = padded("none")[0]
BATCH = {"input_ids": IDS, "labels": IDS}


def state(model: nn.Module) -> list[Any]:
    """What a refused call must leave: types, attributes, modes, gradients, values."""
    modules = [(name, type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()]
    tensors = [(name, x.data_ptr(), x._version, x.grad, x.requires_grad) for name, x in model.named_parameters()]
    return [modules, tensors, torch.get_rng_state().sum().item()]


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_verify_compares_gradients_whatever_the_mode(around: Any):
    model = hf_model()
    with around():
        batch = {name: x.clone() for name, x in BATCH.items()}
        report = gptfast.accelerate(model, verify=batch)
    assert set(report.errors) == {"loss", "logits", *dict(model.named_parameters())}
    assert max(report.errors.values()) < 3 and report.speedup is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_has_loss_and_logits():
    report = gptfast.accelerate(frozen(hf_model()), verify=BATCH)
    assert set(report.errors) == {"loss", "logits"} and report.speedup is not None
    partly = frozen(hf_model())
    partly.transformer.h[1].requires_grad_(True)
    names = {name for name, x in partly.named_parameters() if x.requires_grad}
    assert set(gptfast.accelerate(partly, verify=BATCH).errors) == {"loss", "logits", *names}


def on_meta(model: Any) -> Any:
    model.transformer.register_buffer("table", torch.empty(3, device="meta"))
    return model


REFUSED = {
    "no labels": (lambda m: m, {"input_ids": IDS}, r"verify has no labels \(it has input_ids\).*labels=input_ids"),
    "labels None": (lambda m: m, {"input_ids": IDS, "labels": None}, "verify has no labels"),
    "nothing counts": (
        lambda m: m,
        {"input_ids": IDS, "labels": torch.full_like(IDS, -100)},
        "the loss of the verify batch is nan, .* it needs a label that counts",
    ),
    "nothing counts, frozen": (frozen, {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}, "a label that counts"),
    "another device": (
        lambda m: m,
        {"input_ids": IDS, "labels": IDS.to("meta")},
        "verify has labels on the device meta and the model is on cpu; move the batch there",
    ),
    "buffer on meta": (on_meta, None, "the buffer transformer.table is on the device meta, without values"),
    "buffer on meta, verify": (on_meta, BATCH, "the buffer transformer.table is on the device meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_is_named_and_changes_nothing(case: str):
    change, batch, message = REFUSED[case]
    model = change(hf_model()).train()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        gptfast.accelerate(model, verify=batch)
    assert state(model) == before


class Failing(nn.Module):
    """Fails in a certain call of its forward; calls 1 to 3 are exact, before and after, then steps in turns."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.norm, self.call, self.made = nn.LayerNorm(8), call, [0]

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.made[0] += 1
        if self.made[0] == self.call:
            raise OSError("no space")
        y = self.norm(x)
        return y, (y - labels).square().mean()


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_forward_that_fails_while_it_is_verified_leaves_the_model_unpatched(call: int):
    model = Failing(call).train()
    x = torch.randn(2, 8)
    before = state(model)
    with pytest.raises(OSError, match="no space"):
        gptfast.accelerate(model, verify={"x": x, "labels": x.flip(0)})
    assert state(model) == before
    gptfast.accelerate(model, verify={"x": x, "labels": x.flip(0)})


def test_a_class_that_cannot_be_given_leaves_the_model_unpatched(monkeypatch):
    model = hf_model()
    before = state(model)
    from gptfast.integrations import patch

    class Other:
        __slots__ = ("size",)

    real = patch._patches
    monkeypatch.setattr(patch, "_patches", lambda *a: [*real(*a), patch._Patch(model.transformer.wte, Other, "")])
    with pytest.raises(TypeError, match="assignment"):
        gptfast.accelerate(model)
    assert state(model) == before


def test_versions_of_transformers():
    with pytest.raises(RuntimeError, match=r"transformers 4.57.1 is older than 5.0, .*; pip install -U transformers"):
        _check_version("4.57.1")
    with pytest.warns(UserWarning, match=r"transformers 6.0.0.dev0 is newer than 5\.\d+, .*verify=batch"):
        _check_version("6.0.0.dev0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check_version("5.0.0rc1")


def test_an_old_transformers_is_refused_before_anything_changes(monkeypatch):
    import transformers

    model = hf_model()
    before = state(model)
    monkeypatch.setattr(transformers, "__version__", "4.49.0")
    with pytest.raises(RuntimeError, match=r"transformers 4.49.0 is older"):
        gptfast.accelerate(model)
    assert state(model) == before


# ---- hooks on what the fused attention does not call ---------------------------------------------------------------


def test_hooks_on_the_dropout_of_attention_weights_are_called():
    """Of GPT-1; transformers' GPT-2 does not call it."""
    models = [hf_model("OpenAIGPTLMHeadModel") for _ in range(2)]
    gptfast.accelerate(models[1])
    seen: list[list[Tensor]] = [[], []]
    for model, kept in zip(models, seen, strict=True):
        for block in model.transformer.h:
            block.attn.attn_dropout.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out.detach()))
        model(IDS)
    assert len(seen[0]) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


def test_hooks_on_the_activation_of_gpt1_are_called():
    model = hf_model("OpenAIGPTLMHeadModel")
    expected = model(IDS).logits
    gptfast.accelerate(model)
    seen: list[Tensor] = []
    hook = model.transformer.h[0].mlp.act.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    try:
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    finally:
        hook.remove()  # all models of the process share it
    assert len(seen) == 2
