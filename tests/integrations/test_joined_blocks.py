"""Patched GPT-2 blocks: dropout, residual sum and LayerNorm in one pass, and what others see of the modules they join."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptfast
from tests.support.hf_models import hf_model, padded

pytest.importorskip("transformers")
IDS, _ = padded("none")
LAYERS = 2
DROPS = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}


def patched(**options: Any) -> Any:
    model = hf_model(**options)
    gptfast.accelerate(model)
    return model


def calls(model: nn.Module) -> Counter[str]:
    """How often a training step calls each operator of gptfast."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(IDS, labels=IDS)["loss"].backward()
    return Counter(event.name.removeprefix("gptfast::") for event in profile.events() if "gptfast::" in event.name)


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(IDS, labels=IDS)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def check_same(got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(got[0], expected[0])
    for name, value in expected[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


def watch(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """What hooks see of the modules whose names end so: (name, output)."""
    seen = []
    for name, module in model.named_modules():
        if name.endswith(names):
            module.register_forward_hook(lambda _, args, output, name=name: seen.append((name, output)))
    return seen


def test_sums_dropouts_and_norms_of_a_step_are_one_pass_each():
    found = calls(patched(**DROPS).train())
    assert found["add_layer_norm_fwd"] == found["add_layer_norm_bwd"] == 2 * LAYERS
    assert (
        found["layer_norm_fwd"] == 1 and found["dropout"] == 2
    )  # the first norm; the embeddings, forward and backward
    assert found["gelu_fwd"] == LAYERS


# Each set makes other parts run one by one; the masks are the same, whichever pass applies them.
@pytest.mark.parametrize(
    "names",
    [
        (".attn",),
        (".mlp",),
        ("_dropout", "mlp.dropout"),
        (".ln_2",),
        (".ln_1", "ln_f"),
        ("h.0", "h.1"),
        (".act", ".c_fc"),
    ],
    ids=lambda names: " ".join(names),
)
def test_hooks_see_each_call_and_change_no_result(names: tuple[str, ...]):
    expected = step(patched(**DROPS).train())
    model = patched(**DROPS).train()
    seen = watch(model, names)
    check_same(step(model), expected)
    watched = [name for name, _ in model.named_modules() if name.endswith(names) and not name.endswith("attn_dropout")]
    assert sorted(name for name, _ in seen) == sorted(watched)


def test_hooks_of_attention_mlp_and_their_dropouts_see_dropped_values():
    model = patched(**DROPS).train()
    seen = watch(model, (".attn", ".mlp", "resid_dropout", "mlp.dropout"))
    step(model)
    assert len(seen) == 4 * LAYERS
    for name, output in seen:
        output = output[0] if isinstance(output, tuple) else output
        assert 0.1 < float((output == 0).float().mean()) < 0.3, name


def test_a_hook_that_changes_the_residual_stream_counts():
    plain, model = hf_model(), patched()
    for each in (plain, model):
        each.transformer.h[0].register_forward_hook(lambda _, args, output: output * 2)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    for each in (plain, model):
        each.transformer.h[1].register_forward_hook(lambda _, args, output: output.add_(1.0))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


WRITTEN = ["h.0", "h.1", "h.0.attn", "h.1.mlp", "ln_f", "h.1.ln_1", "drop", "h.0.mlp.c_fc", "h.0.attn.c_attn"]


@pytest.mark.parametrize("place", WRITTEN)
def test_a_hook_that_writes_into_what_a_module_returned(place: str):
    """As steering vectors are added; backward must not need what was there."""

    def steer(module: nn.Module, args: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).add_(0.5)

    found = []
    for model in (hf_model(), patched()):
        model.transformer.get_submodule(place).register_forward_hook(steer)
        found.append(step(model))
    (expected, expected_grads), (loss, grads) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, value in expected_grads.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)


def test_a_block_by_itself_and_blocks_of_another_class():
    plain, model = hf_model(), patched()
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(model.transformer.h[0](x), plain.transformer.h[0](x), rtol=1e-4, atol=1e-4)
    gptfast.restore(model.transformer.h[1])
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_cache_filled_in_training_holds_the_keys_without_copies():
    plain, model = hf_model().train(), patched().train()
    for each in (plain, model):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    expected, got = (each(IDS[:, :-1], use_cache=True).cache for each in (plain, model))
    for theirs, ours in zip(expected.layers, got.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
        assert ours.keys.untyped_storage().data_ptr() == ours.values.untyped_storage().data_ptr()
    last = [each(IDS[:, -1:], cache=cache).logits for each, cache in ((plain, expected), (model, got))]
    torch.testing.assert_close(last[1], last[0], rtol=1e-4, atol=1e-4)
    assert got.get_seq_length() == IDS.shape[1]
