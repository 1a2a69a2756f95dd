"""Adapters of a GPT: what they compute, what they leave alone, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gptfast
from gptfast.finetuning import LoraConfig

CONFIG = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
ALL = ["c_attn", "c_proj", "c_fc"]
IDS = torch.arange(3 * 20).view(3, 20) * 7 % 61


def model(config: gptfast.GPTConfig = CONFIG, **options: Any) -> gptfast.GPT:
    """A GPT with an adapter that is not zero."""
    torch.manual_seed(0)
    gpt = gptfast.GPT(config).eval()
    gpt.add_adapter(LoraConfig(**{"r": 4, "target_modules": ALL, "init_lora_weights": False, **options}))
    return gpt


def two() -> gptfast.GPT:
    gpt = model()
    gpt.add_adapter(LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False), "other")
    return gpt


def test_a_new_adapter_freezes_the_base_and_changes_nothing():
    torch.manual_seed(0)
    gpt = gptfast.GPT(CONFIG).eval()
    before = gpt(IDS)
    gpt.add_adapter(LoraConfig(r=4, target_modules=ALL))
    assert torch.equal(gpt(IDS), before)
    names = {n for n, p in gpt.named_parameters() if p.requires_grad}
    assert "h.0.attn.c_attn.lora_A.default.weight" in names and "h.1.mlp.c_proj.lora_B.default.weight" in names
    assert all(".lora_" in name for name in names) and len(names) == 2 * 2 * 4
    gpt.delete_adapter("default")
    assert gpt.adapters is None and all(p.requires_grad for p in gpt.parameters())
    assert [type(m) for m in gpt.modules()] == [type(m) for m in gptfast.GPT(CONFIG).modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_computes_the_sum_of_the_base_and_its_update(dtype: torch.dtype):
    gpt = model().to(dtype)
    layer = gpt.h[0].mlp.c_fc
    x = torch.randn(2, 9, 32).to(dtype)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    linear = torch.nn.functional.linear(x, layer.weight + (8 / 4) * b @ a, layer.bias)
    expected = torch.nn.functional.gelu(linear.double(), approximate="tanh")
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # 8 bits of mantissa
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_autograd():
    gpt = model(lora_dropout=0.25).train()
    gpt.dropout_seed = 3
    gradients = []
    for backend in ("auto", "eager"):
        gpt.dropout_step = 5
        with gptfast.backend(backend):
            gpt(IDS, IDS)[1].backward()
        gradients.append({n: p.grad for n, p in gpt.named_parameters() if p.requires_grad})
        gpt.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in gpt.parameters() if not p.requires_grad)


def test_dropout_follows_seed_and_step():
    gpt = model(lora_dropout=0.5).train()
    gpt.dropout_seed = 1
    first, second = gpt(IDS, IDS)[1], gpt(IDS, IDS)[1]
    assert first != second and gpt.dropout_step == 2
    gpt.dropout_step = 0
    assert gpt(IDS, IDS)[1] == first
    masks = {gpt.h[layer].attn.c_attn.number for layer in (0, 1)}
    assert len(masks) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_trains_every_layer_or_says_so(reentrant: bool):
    gpt = model().train()
    plain = copy.deepcopy(gpt)
    for block in gpt.h[:1] if reentrant else gpt.h:
        forward = block.forward
        block.forward = lambda *args, f=forward, **kw: checkpoint(
            lambda *a: f(*a, **kw), *args, use_reentrant=reentrant, preserve_rng_state=True
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpt(IDS, IDS)[1].backward()
    said = [str(w.message) for w in caught if "got no gradient" in str(w.message)]
    if reentrant:
        assert "h.0.attn.c_attn.lora_A.default.weight" in said[0]
        return
    assert not said
    plain(IDS, IDS)[1].backward()
    for (name, p), q in zip(gpt.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (".lora_" not in name)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_autocast_and_half_precision_train():
    for gpt, half in ((model(), False), (model().to(torch.bfloat16), True)):
        gpt.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            gpt(IDS, IDS)[1].backward()
        a = gpt.h[0].attn.c_attn.lora_A["default"].weight
        assert a.grad is not None and a.grad.isfinite().all() and a.grad.any()
    torch.manual_seed(0)
    base = gptfast.GPT(CONFIG).bfloat16()
    base.add_adapter(LoraConfig())
    assert base.h[0].attn.c_attn.lora_A["default"].weight.dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_model_has_the_same_adapters():
    gpt = model().train()
    expected = gpt(IDS, IDS)[1]
    compiled = torch.compile(gpt, backend="aot_eager")
    loss = compiled(IDS, IDS)[1]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert gpt.h[0].attn.c_attn.lora_A["default"].weight.grad.any()


def test_active_adapters_are_added_up_and_trained():
    gpt = two()
    assert gpt.active_adapters == ["other"]
    alone = {}
    for name in ("default", "other"):
        gpt.set_adapter(name)
        alone[name] = gpt(IDS)
        assert {n.split(".")[-2] for n, p in gpt.named_parameters() if p.requires_grad} == {name}
    gpt.set_adapter(["default", "other"])
    both = gpt(IDS)
    gpt.disable_adapters()
    base = gpt(IDS)
    assert len({float(x.detach().sum()) for x in (base, both, *alone.values())}) == 4
    gpt.enable_adapters()
    assert torch.equal(gpt(IDS), both)
    gpt.merge_adapter()
    torch.testing.assert_close(gpt(IDS), both, rtol=1e-5, atol=1e-5)


def test_merging_gives_a_plain_model_and_unmerging_the_old_bits(tmp_path):
    gpt = model(modules_to_save=["lm_head"])
    state = {k: v.clone() for k, v in gpt.state_dict().items()}
    expected = gpt(IDS)
    with pytest.raises(ValueError, match=r"adapter 'default', which is not merged"):
        gpt.save_pretrained(tmp_path / "no")
    with pytest.raises(
        ValueError, match=r"compile_for_inference: the adapter 'default' has a copy of its own of lm_head"
    ):
        gpt.compile_for_inference()
    gpt.merge_adapter()
    gpt.merge_adapter()  # no effect
    merged = gpt(IDS)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    gpt.save_pretrained(tmp_path / "merged")
    assert torch.equal(gptfast.GPT.from_pretrained(tmp_path / "merged")(IDS), merged)
    assert gpt.compile_for_inference("float32").logits(IDS).shape == merged.shape
    for call in (gpt.disable_adapters, lambda: gpt.delete_adapter("default"), lambda: gpt.save_adapter(tmp_path / "a")):
        with pytest.raises(ValueError, match=r"'default' is merged; call unmerge_adapter\(\) first"):
            call()
    for call in (gpt, lambda ids, **names: gpt.generate(ids, 2, **names)):
        for name in ("default", "__base__"):  # the weights are the adapter's for every row
            with pytest.raises(ValueError, match=r"adapter_names is given while 'default' is merged"):
                call(IDS, adapter_names=[name] * len(IDS))
    gpt.unmerge_adapter()
    assert all(torch.equal(v, state[k]) for k, v in gpt.state_dict().items()) and len(state) == len(gpt.state_dict())
    assert torch.equal(gpt(IDS), expected)


def test_generate_uses_the_adapter():
    gpt = model()

    def continued(config_of: gptfast.GPT) -> torch.Tensor:
        ids = IDS
        for _ in range(4):
            ids = torch.cat((ids, config_of(ids)[:, -1].argmax(-1, keepdim=True)), 1)
        return ids

    with_adapter = gpt.generate(IDS, 4)
    assert torch.equal(with_adapter, continued(gpt))
    gpt.disable_adapters()
    assert torch.equal(gpt.generate(IDS, 4), continued(gpt)) and not torch.equal(gpt.generate(IDS, 4), with_adapter)


@pytest.mark.parametrize("training", [False, True])
def test_rows_of_a_mixed_batch_are_those_of_the_row_alone(training: bool):
    gpt = two().train(training)
    names = ["default", "__base__", "other", "other"]
    ids = torch.cat((IDS, IDS[:1]))
    gpt.add_adapter(
        LoraConfig(target_modules=["c_fc"], modules_to_save=["wte", "lm_head"], init_lora_weights=False), "third"
    )
    with torch.no_grad():
        gpt.wte.modules_to_save["third"].weight.mul_(1.5)
    names, ids = [*names, "third"], torch.cat((ids, IDS[1:2]))
    mixed = gpt(ids, adapter_names=names)
    for row, name in enumerate(names):
        gpt.enable_adapters()
        assert torch.equal(mixed[row], gpt(ids[row : row + 1], adapter_names=[name])[0])  # 20 rows: our own products
        if name == "__base__":
            gpt.disable_adapters()
        else:
            gpt.set_adapter(name)
        assert torch.equal(mixed[row], gpt(ids[row : row + 1])[0])
    if training:
        for p in gpt.parameters():
            p.requires_grad_(True)
        gpt(ids, ids, adapter_names=names)[1].backward()
        grads = {n: p.grad for n, p in gpt.named_parameters()}
        total = 0
        gpt.zero_grad()
        for row, name in enumerate(names):
            total = total + gpt(ids[row : row + 1], ids[row : row + 1], adapter_names=[name])[1] / len(names)
        total.backward()
        for name, p in gpt.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-6)


BAD = {
    "no module": ({"target_modules": ["c_atn"]}, r"target_modules has 'c_atn', .*did you mean 'c_attn'"),
    "one of two": ({"target_modules": ["c_attn", "mlp.fc"]}, r"'mlp\.fc'.*did you mean 'mlp\.c_fc'"),
    "regex": ({"target_modules": r".*\.q_proj"}, r"target_modules has '.*q_proj', and no module"),
    "regex of an ending": (
        {"target_modules": "c_attn"},
        r"no whole name matches; for names that end so say \['c_attn'\]",
    ),
    "bad regex": ({"target_modules": "("}, "no regular expression"),
    "embedding": ({"target_modules": ["wte"]}, r"names wte \(Embedding\); low-rank updates are for the linear layers"),
    "saved": ({"modules_to_save": ["score"]}, "modules_to_save has 'score'"),
    "positions": ({"modules_to_save": ["wpe"]}, "modules_to_save names wpe"),
    "layer": (
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 9]},
        "layers_to_transform has 9; the model has",
    ),
    "none": ({"target_modules": []}, r"target_modules=\[\] leave no module"),
    "nothing": (
        {"target_modules": ["c_fc"], "exclude_modules": ["c_fc"]},
        r"target_modules=\['c_fc'\] and exclude_modules=\['c_fc'\] leave no module",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_modules_leave_the_model_as_it_was(case: str):
    options, message = BAD[case]
    gpt = gptfast.GPT(CONFIG)
    with pytest.raises(ValueError, match=message):
        gpt.add_adapter(LoraConfig(**options))
    assert gpt.adapters is None and all(p.requires_grad for p in gpt.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["x"]},
        {"layer_replication": [[0, 1]]},
        {"r": 0},
        {"lora_alpha": 0},
        {"lora_dropout": 1.0},
        {"bias": "some"},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"c_attn": 0}},
        {"layers_to_transform": "h"},
        {"layers_to_transform": [0, -1]},
        {"layers_to_transform": [0], "target_modules": "all-linear"},
        {"layers_pattern": "h", "target_modules": r"h\.0\..*"},
        {"layers_pattern": "h"},
        {"use_rslora": "yes"},
        {"rank_pattern": ["c_attn"]},
        {"rank_pattern": {"c_attn[": 2}},
        {"alpha_pattern": {"c_attn)": 2}},
        {"alpha_pattern": {3: 2}},
        {"layers_pattern": "h(", "layers_to_transform": [0]},
        {"layers_pattern": 3, "layers_to_transform": [0]},
        {"exclude_modules": "*"},
    ],
)
def test_what_a_config_refuses_is_named(options: dict[str, Any]):
    with pytest.raises((TypeError, ValueError), match=f"LoraConfig: {next(iter(options))}"):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["attn.c_proj"], 2),
        (["transformer.h.1.mlp.c_fc"], 1),
        (["h.1.mlp.c_fc"], 1),
        (r"transformer\.h\.0\..*", 0),
        (r"transformer\.h\.0\.(attn|mlp)\.c_.*", 4),
        (r"h\.0\.mlp\.c_fc", 1),
        ("all-linear", 8),
        (None, 2),
    ],
)
def test_target_modules(targets: Any, count: int):
    gpt = gptfast.GPT(CONFIG)
    if count == 0:
        with pytest.raises(ValueError, match=r"names h\.0\.ln_1 \(LayerNorm\)"):
            gpt.add_adapter(LoraConfig(target_modules=targets))
        return
    gpt.add_adapter(LoraConfig(target_modules=targets))
    assert sum(".lora_A." in name for name, _ in gpt.named_parameters()) == count


def test_a_pattern_means_layers_of_the_base_not_of_another_adapter():
    """h.0.attn.c_attn.lora_A, which the first adapter made, fits the pattern too."""
    gpt = model()
    gpt.add_adapter(LoraConfig(r=2, target_modules=r"h\.\d\.attn\.c_attn.*"), "other")
    assert [n for n, m in gpt.named_modules() if hasattr(m, "lora_A") and "other" in m.lora_A] == [
        "h.0.attn.c_attn",
        "h.1.attn.c_attn",
    ]


def test_patterns_and_layers():
    gpt = gptfast.GPT(CONFIG)
    unmatched = {"rank_pattern": {"c_fx": 2, "c_fc": 3}, "alpha_pattern": {"^h.9.mlp": 4}}
    with pytest.warns(RuntimeWarning) as said:  # as in peft
        gpt.add_adapter(LoraConfig(target_modules=ALL, **unmatched), "unmatched")
    texts = [str(one.message) for one in said]
    assert "add_adapter: rank_pattern has ['c_fx'], which fit no target module and change nothing" in texts
    assert any("alpha_pattern has ['^h.9.mlp']" in text for text in texts)
    gpt.delete_adapter("unmatched")
    gpt.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=ALL,
            layers_to_transform=1,
            exclude_modules=["attn.c_proj"],
            rank_pattern={"mlp.c_fc": 2},
            alpha_pattern={"c_attn": 12},
            use_rslora=True,
        )
    )
    found = {n: m.lora_A["default"] for n, m in gpt.named_modules() if hasattr(m, "lora_A")}
    assert {n: len(a.weight) for n, a in found.items()} == {
        "h.1.attn.c_attn": 4,
        "h.1.mlp.c_fc": 2,
        "h.1.mlp.c_proj": 4,
    }
    assert [round(a.scale, 6) for a in found.values()] == [6.0, round(6 / 2**0.5, 6), 3.0]


def test_names_are_checked():
    gpt = two()
    for call, message in (
        (lambda: gpt.add_adapter(LoraConfig(), "other"), "there is an adapter 'other' already"),
        (lambda: gpt.add_adapter(LoraConfig(), "a.b"), "name is 'a.b'"),
        (lambda: gpt.add_adapter(LoraConfig(), "__base__"), "name is '__base__'"),
        (lambda: gpt.add_adapter(LoraConfig(bias="all"), "third"), "of which one has a bias"),
        (lambda: gpt.set_adapter("no"), "no adapter 'no'; the model has 'default', 'other'"),
        (lambda: gpt.delete_adapter("no"), "no adapter 'no'"),
        (lambda: gpt.merge_adapter("no"), "no adapter 'no'"),
        (lambda: gpt(IDS, adapter_names=["default"]), "adapter_names has 1 names and the batch 3 rows"),
        (lambda: gpt(IDS, adapter_names=["default", "no", "other"]), "adapter_names has 'no'"),
        (lambda: gptfast.GPT(CONFIG)(IDS, adapter_names=["x"] * 3), "adapter_names has 'x'"),
        (lambda: gptfast.GPT(CONFIG).set_adapter("x"), "the model has no adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert gpt.active_adapters == ["other"]
    with pytest.raises(TypeError, match="config is a dict"):
        gpt.add_adapter({"r": 3}, "third")


def test_deletion_keeps_the_other_and_restores_trained_biases():
    gpt = two()
    gpt.set_adapter("default")
    expected = gpt(IDS)
    gpt.delete_adapter("other")
    assert torch.equal(gpt(IDS), expected)
    gpt = gptfast.GPT(CONFIG).eval()
    before = gpt(IDS)
    gpt.add_adapter(LoraConfig(bias="all"))
    with torch.no_grad():
        gpt.h[0].ln_1.bias.add_(1)
    assert gpt.h[0].ln_1.bias.requires_grad and not torch.equal(gpt(IDS), before)
    with pytest.warns(UserWarning, match="the biases of the base were trained"):
        gpt.disable_adapters()
    gpt.delete_adapter("default")
    assert torch.equal(gpt(IDS), before)


def test_copies_and_state_dicts():
    gpt = two()
    twin = copy.deepcopy(gpt)
    twin.set_adapter("default")
    assert gpt.active_adapters == ["other"] and not torch.equal(gpt(IDS), twin(IDS))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(gpt.state_dict())
    twin.set_adapter("other")
    assert torch.equal(gpt(IDS), twin(IDS))


def test_a_loss_of_no_trained_parameter_is_said():
    gpt = model().train()
    gpt.disable_adapters()
    with pytest.warns(UserWarning, match="depends on no trained parameter"):
        gpt(IDS, IDS)
