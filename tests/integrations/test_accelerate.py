"""Patched models of transformers: the unpatched model's results, within twice its own error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptfast
from gptfast.integrations.swap import original_class
from tests.support.hf_models import CLASSES, T, V, hf_model, labels_of, padded

transformers = pytest.importorskip("transformers")

FLOOR = 3e-7  # of the largest value: one rounding of fp32 more or less
LEAST = 0.1  # is the size of the terms of a gradient that cancels to nothing, as those of ln_f.bias under a softmax
LARGEST = (
    4.0  # Over 60 random models the largest error is 1.0 times eager's in the median, above 2 in 0.2%, at most 3.7.
)


def results(model: nn.Module, batch: dict[str, Any], shown: Tensor | None = None) -> dict[str, Tensor]:
    """Loss, logits (or what else comes first) and all gradients; `shown`: positions that count."""
    model.zero_grad()
    outputs = model(**batch)
    main = next(value for key, value in outputs.items() if key not in ("loss", "mc_loss"))
    loss = outputs.get("loss") if outputs.get("loss") is not None else None
    if loss is None:
        values = main if shown is None else main[shown]
        loss = (values * torch.linspace(-1, 1, values.shape[-1], dtype=values.dtype)).sum()
    if outputs.get("mc_loss") is not None:
        loss = loss + outputs["mc_loss"]
    loss.backward()
    main = main.detach() if shown is None or main.shape[:2] != shown.shape else main.detach()[shown]
    found = {"loss": loss.detach(), "first": main}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(model: nn.Module, batch: dict[str, Any], shown: Tensor | None = None) -> gptfast.integrations.Report:
    """Patch the model: every result is at most twice as far from float64 as the unpatched one's, in the root mean square.

    And no element is further than LARGEST times the worst of the unpatched one's.
    """
    double = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in batch.items()}
    exact = results(copy.deepcopy(model).double(), double, shown)
    before = results(model, batch, shown)
    report = gptfast.accelerate(model)
    after = results(model, batch, shown)
    assert exact.keys() == before.keys() == after.keys()
    for name, value in exact.items():
        scale, theirs, ours = float(value.abs().max()), before[name] - value, after[name] - value
        floor = FLOOR * max(scale, LEAST if name not in ("loss", "first") else 0.0)
        assert float(ours.square().mean().sqrt()) <= 2 * float(theirs.square().mean().sqrt()) + floor, name
        assert float(ours.abs().max()) <= LARGEST * float(theirs.abs().max()) + floor, name
        assert after[name].dtype == before[name].dtype, name
    return report


def batch_of(name: str, sides: str) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a forward of any of the classes, and the positions that count."""
    ids, mask = padded(sides)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "LMHead" in name:
        batch["labels"] = labels_of(ids, mask)
    if "DoubleHeads" in name:
        batch = {"input_ids": ids[:, None].expand(3, 2, T).contiguous(), "attention_mask": None}
        batch |= {
            "labels": batch["input_ids"],
            "mc_token_ids": torch.full((3, 2), T - 1),
            "mc_labels": torch.tensor([0, 1, 1]),
        }
    if "SequenceClassification" in name:
        batch["labels"] = torch.tensor([0, 1, 1])
    if "TokenClassification" in name:
        batch["labels"] = (ids % 2).masked_fill(mask == 0, -100)
    if "QuestionAnswering" in name:
        batch |= {"start_positions": torch.tensor([6, 3, 9]), "end_positions": torch.tensor([9, 12, 11])}
    return batch, mask.bool()


@pytest.mark.parametrize("sides", ["none", "left", "right", "both"])
@pytest.mark.parametrize("name", CLASSES)
def test_results_and_gradients_are_those_of_the_unpatched_model(name: str, sides: str):
    if "QuestionAnswering" in name and sides != "none":
        pytest.skip("its softmax over positions takes padding too, which means nothing")
    batch, shown = batch_of(name, sides)
    report = check_equal(hf_model(name), batch, shown if "LMHead" in name or name.endswith("Model") else None)
    assert any("causal_attention" in told for told in report.replaced.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention_implementation_of_the_config(attention: str):
    batch, shown = batch_of("GPT2LMHeadModel", "both")
    check_equal(hf_model(attn_implementation=attention), batch, shown)


OPTIONS: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "packed documents": lambda model, ids: {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(9), torch.arange(T - 9)])[None].expand(3, -1),
        "use_cache": False,
    },
    "a float mask": lambda model, ids: {
        "input_ids": ids,
        "attention_mask": torch.full((3, 1, T, T), torch.finfo(torch.float32).min).triu(1),
    },
    "a mask with holes": lambda model, ids: {
        "input_ids": ids,
        "attention_mask": (torch.ones(T, T).tril() * (torch.arange(T) % 5 != 1) + torch.eye(T))
        .bool()
        .expand(3, 1, T, T),
    },
    "a bias": lambda model, ids: {
        "input_ids": ids,
        "attention_mask": torch.full((3, 1, T, T), -1e30).triu(1) + torch.arange(T) * 0.1,
    },
    "embeddings": lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids).detach() * 1.5},
    "token types": lambda model, ids: {"input_ids": ids, "token_type_ids": ids % 2},
    "one token": lambda model, ids: {"input_ids": ids[:, :1]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_a_forward_may_be_given(option: str):
    model = hf_model()
    ids, _ = padded("none")
    batch = OPTIONS[option](model, ids)
    if option != "one token":
        batch["labels"] = ids
    check_equal(model, batch)


def test_tuples_are_those_of_the_unpatched_model():
    model, (batch, _) = hf_model(), batch_of("GPT2LMHeadModel", "none")
    before = model(**batch, return_dict=False)
    gptfast.accelerate(model)
    after = model(**batch, return_dict=False)
    assert type(after) is tuple and len(after) == len(before)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], before[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("filled_by", ["patched", "plain"])
def test_a_cache_filled_by_one_is_read_by_the_other(kind: str, filled_by: str):
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    first, second = (patched, plain) if filled_by == "patched" else (plain, patched)
    ids, _ = padded("none")
    options = {"max_cache_len": 40} if kind == "StaticCache" else {}
    cache = getattr(transformers, kind)(config=plain.config, **options)
    with torch.no_grad():
        whole = plain(ids).logits
        one = first(ids[:, :10], past_key_values=cache, use_cache=True).logits
        two = second(ids[:, 10:-1], cache=cache, use_cache=True).logits
        three = second(ids[:, -1:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([one, two, three], 1), whole, rtol=1e-4, atol=1e-4)


def test_a_cropped_and_reordered_cache_goes_on():
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    ids, _ = padded("none")
    logits = []
    for model in (plain, patched):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, cache=cache, use_cache=True)
            cache.crop(-12)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            logits.append(model(ids[:, 3:5], cache=cache, use_cache=True).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_attention_weights_come_from_the_models_own_attention(caplog):
    plain, patched = hf_model(attn_implementation="eager"), hf_model(attn_implementation="eager")
    gptfast.accelerate(patched)
    ids, _ = padded("none")
    expected, got = (model(ids, output_attentions=True).attentions for model in (plain, patched))
    assert len(got) == len(expected) == 2
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    one = hf_model("OpenAIGPTLMHeadModel")
    gptfast.accelerate(one)
    assert one(ids, output_attentions=True).attentions[1].shape == (3, 4, T, T)


def test_hidden_states_are_recorded():
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    ids, _ = padded("none")
    expected, got = (model(ids, output_hidden_states=True).hidden_states for model in (plain, patched))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
def test_restore_undoes_it_bit_for_bit(name: str):
    model, other = hf_model(name), hf_model(name)
    (batch, shown), types = batch_of(name, "both"), [type(module) for module in model.modules()]
    keys, parameters = [list(vars(module)) for module in model.modules()], list(model.parameters())
    before = results(model, batch, shown)
    gptfast.accelerate(model)
    assert isinstance(model, types[0]) and [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert not any(original_class(module) for module in other.modules())
    with pytest.raises(ValueError, match="already patched; restore"):
        gptfast.accelerate(model)
    gptfast.restore(model)
    assert [type(module) for module in model.modules()] == types
    assert [list(vars(module)) for module in model.modules()] == keys
    after = results(model, batch, shown)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(ValueError, match="is not patched"):
        gptfast.restore(model)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_patched_share_nothing_and_can_be_restored(way: Callable[[Any], Any]):
    model, (batch, shown) = hf_model(), batch_of("GPT2LMHeadModel", "right")
    gptfast.accelerate(model)
    twin = way(model)
    got, expected = results(twin, batch, shown), results(model, batch, shown)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    with torch.no_grad():
        twin.transformer.wte.weight.zero_()
    assert bool(model.transformer.wte.weight.any())
    gptfast.restore(twin)
    assert type(twin) is transformers.GPT2LMHeadModel and original_class(model) is transformers.GPT2LMHeadModel


def test_saved_files_are_the_same(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path / "plain")
    gptfast.accelerate(model)
    model.save_pretrained(tmp_path / "patched")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_gradients_of_a_run_without(reentrant: bool):
    model, (batch, _) = hf_model().train(), batch_of("GPT2LMHeadModel", "none")
    gptfast.accelerate(model)
    torch.manual_seed(5)
    expected = results(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(5)
    got = results(model, batch)
    assert torch.equal(got["loss"], expected["loss"])
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("sides", ["none", "both"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
def test_inference_mode(name: str, sides: str):
    """Its tensors have no version."""
    batch, shown = batch_of(name, sides)
    found = []
    for patch in (False, True):
        with torch.inference_mode():
            model = hf_model(name)
            if patch:
                gptfast.accelerate(model)
            outputs = model(**batch)
            found.append((outputs.loss, outputs.logits[shown]))
    for got, value in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


def test_a_mask_of_inference_mode_that_is_written_into():
    ids, _ = padded("none")
    model, mask = hf_model(), torch.ones(3, 1, T, T).tril().bool()
    expected = [model(ids, attention_mask=m).logits for m in (mask, mask & (torch.arange(T) > 2))]
    gptfast.accelerate(model)
    with torch.inference_mode():
        mask = mask.clone()
        first = model(ids, attention_mask=mask).logits
        mask[..., :3] = False
        second = model(ids, attention_mask=mask).logits
    for got, value in zip((first, second), expected, strict=True):
        torch.testing.assert_close(got[:, 3:], value[:, 3:], rtol=1e-4, atol=1e-4)


def test_dropout_follows_manual_seed_and_the_mode():
    model, (batch, _) = hf_model().train(), batch_of("GPT2LMHeadModel", "none")
    gptfast.accelerate(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(model(**batch).loss))
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert float(model(**batch).loss) == float(model(**batch).loss)


def test_what_changes_after_patching_counts():
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    for model in (plain, patched):
        model.resize_token_embeddings(V + 8, mean_resizing=False)
        for norm in (model.transformer.ln_f, model.transformer.h[0].ln_1):
            norm.eps = 0.3
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    batch, shown = batch_of("GPT2LMHeadModel", "none")
    expected, got = results(plain, batch, shown), results(patched, batch, shown)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=2e-4, atol=2e-5, msg=name)
    patched.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype):
    batch, shown = batch_of("GPT2LMHeadModel", "both")
    exact = results(hf_model().double(), batch, shown)
    half, patched = hf_model().to(dtype), hf_model().to(dtype)
    gptfast.accelerate(patched)
    mixed = hf_model()
    gptfast.accelerate(mixed)
    for ours, theirs, autocast in ((patched, half, False), (mixed, hf_model(), True)):
        with torch.autocast("cpu", dtype, enabled=autocast):
            got, before = results(ours, batch, shown), results(theirs, batch, shown)
        for name in exact:
            error, own = ((x[name].double() - exact[name]).norm() for x in (got, before))
            # the loss is a mean in which rounding errors of both signs cancel, by luck: measured 0.03 of one rounding
            floor = 0.1 * torch.finfo(dtype).eps if name == "loss" else FLOOR
            assert error <= 2 * own + floor * exact[name].norm(), name


def test_a_refused_call_leaves_the_model_as_it_was():
    for model, error, told in (
        (nn.Sequential(nn.ReLU(), nn.Softmax(-1)), ValueError, "nothing to replace"),
        (nn.Linear(2, 2, device="meta"), ValueError, "device meta"),
        ("gpt2", TypeError, "expected a torch.nn.Module"),
    ):
        with pytest.raises(error, match=told):
            gptfast.accelerate(model)
    model = hf_model()
    with pytest.raises(ValueError, match="verify has no labels"):
        gptfast.accelerate(model, verify={"input_ids": padded("none")[0]})
    with pytest.raises(TypeError, match="expected a dict of the model's arguments"):
        gptfast.accelerate(model, verify=[1, 2])
    with pytest.raises(
        ValueError, match="the unpatched model does not run on the verify batch: IndexError: index out of range"
    ):
        gptfast.accelerate(model, verify={"input_ids": torch.tensor([[V]]), "labels": torch.tensor([[0]])})
    assert not any(original_class(module) for module in model.modules())


def test_verify_measures_errors_and_speed_and_leaves_no_trace():
    model, (batch, _) = hf_model().train(), batch_of("GPT2LMHeadModel", "right")
    state = torch.get_rng_state()
    report = gptfast.accelerate(model, verify=batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert {"loss", "logits", "transformer.wte.weight"} <= report.errors.keys()
    assert max(report.errors.values()) < 4 and report.speedup > 0
    text = str(report)
    assert "transformer.h.*.attn" in text and "causal_attention" in text and "times as fast" in text


def test_what_is_left_alone_is_told_and_why():
    class MyLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    model = nn.Sequential(
        nn.Linear(4, 4),
        MyLinear(4, 4),
        nn.Dropout(0.1, inplace=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    )
    model[0].forward = model[0].forward
    model.append(nn.LayerNorm(4))
    report = gptfast.accelerate(model)
    assert list(report.replaced) == ["4"]
    assert "forward was replaced" in report.skipped["0"] and "MyLinear" in report.skipped["1"]
    assert report.skipped["2"] == "inplace" and report.skipped["3"] == "parametrised"


def test_cross_attention_is_left_alone_and_listed():
    model = hf_model("GPT2Model", add_cross_attention=True)
    ids, _ = padded("none")
    seen = torch.randn(3, 7, 32)
    before = model(ids, encoder_hidden_states=seen).last_hidden_state
    report = gptfast.accelerate(model)
    assert report.skipped["h.0.crossattention"] == "cross-attention"
    torch.testing.assert_close(model(ids, encoder_hidden_states=seen).last_hidden_state, before, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compiled first", "patched first"])
def test_torch_compile(order: str):
    model, (batch, _) = hf_model(), batch_of("GPT2LMHeadModel", "right")
    expected = results(model, batch)
    torch._dynamo.reset()
    if order == "compiled first":
        compiled = torch.compile(model, backend="eager")  # what notices the patch is Dynamo, in every backend
        compiled(**batch)
        gptfast.accelerate(model)
    else:
        gptfast.accelerate(model)
        compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"], rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_torch_export():
    model, (ids, _) = hf_model(), padded("none")
    expected = model(ids).logits
    gptfast.accelerate(model)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert any("gptfast" in str(node.target) for node in program.graph.nodes)
