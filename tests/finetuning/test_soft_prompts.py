"""Soft prompts of a GPT: what they compute, in rows of every kind, and what is refused."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gptfast
from gptfast.finetuning import LoraConfig, PromptTuningConfig

CONFIG = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
IDS = torch.arange(3 * 20).view(3, 20) * 7 % 61


def model(config: gptfast.GPTConfig = CONFIG, **prompts: int) -> gptfast.GPT:
    """A GPT with soft prompts of these lengths, by name, that are far from any token's embedding."""
    torch.manual_seed(0)
    gpt = gptfast.GPT(config).eval()
    for name, n in (prompts or {"default": 5}).items():
        gpt.add_adapter(PromptTuningConfig(n, prompt_tuning_init="RANDOM"), name)
    return gpt


def weight_of(gpt: gptfast.GPT, name: str = "default") -> torch.nn.Parameter:
    return gpt.get_parameter(f"prompt_encoder.{name}.embedding.weight")


def spliced(gpt: gptfast.GPT, ids: torch.Tensor, name: str = "default") -> torch.Tensor:
    """Logits of one row by the definition: the prompt's vectors as embeddings of new tokens of a plain model."""
    prompt, plain = weight_of(gpt, name).detach(), gptfast.GPT(gpt.config.replace(tie_weights=False)).eval()
    base = {k: v for k, v in gpt.state_dict().items() if not k.startswith("prompt_encoder")}
    plain.load_state_dict(base)
    V = gpt.config.vocab_size
    plain.resize_token_embeddings(V + len(prompt))
    with torch.no_grad():
        plain.wte.weight[V:] = prompt
        return plain(torch.cat((torch.arange(V, V + len(prompt)), ids))[None])[:, len(prompt) :, :V]


def test_a_new_prompt_freezes_the_base():
    torch.manual_seed(0)
    gpt = gptfast.GPT(CONFIG).eval()
    before, count = gpt(IDS), gpt.num_parameters()
    gpt.add_adapter(PromptTuningConfig(5))
    assert [n for n, p in gpt.named_parameters() if p.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    assert (gpt.num_parameters(), gpt.num_parameters(only_trainable=True)) == (count + 5 * 32, 5 * 32)
    with_prompt = gpt(IDS)
    assert with_prompt.shape == before.shape and (with_prompt - before).abs().max() > 1e-3
    gpt.disable_adapters()
    assert torch.equal(gpt(IDS), before) and gpt.active_adapters == []
    gpt.enable_adapters()
    assert torch.equal(gpt(IDS), with_prompt) and gpt.active_adapters == ["default"]
    gpt.delete_adapter("default")
    assert torch.equal(gpt(IDS), before) and gpt.adapters is None
    assert [type(m) for m in gpt.modules()] == [type(m) for m in gptfast.GPT(CONFIG).modules()]
    assert all(p.requires_grad for p in gpt.parameters())


CONFIGS = {
    "GPT-2": CONFIG,
    "GPT-1": CONFIG.replace(norm_position="post", final_norm=False),
    "sinusoids": CONFIG.replace(position_embedding="sinusoidal"),
    "banded": CONFIG.replace(attention_pattern="alternating", window=6),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_is_a_prefix_of_embeddings(kind: str):
    gpt = model(CONFIGS[kind])
    for row in IDS:
        torch.testing.assert_close(gpt(row[None]), spliced(gpt, row), rtol=1e-5, atol=1e-5)
    assert gpt.hidden_states(IDS).shape == (3, 20, 32)
    assert torch.equal(gpt.lm_head(gpt.hidden_states(IDS)), gpt(IDS))


def test_where_prompts_start(tmp_path):
    gpt = gptfast.GPT(CONFIG)
    rows = {tuple(row.tolist()) for row in gpt.wte.weight}
    weights = []
    for name in ("one", "two"):
        torch.manual_seed(7)
        gpt.add_adapter(PromptTuningConfig(6), name)
        weights.append(weight_of(gpt, name))
        assert all(tuple(row.tolist()) in rows for row in weights[-1])
    assert torch.equal(*weights)
    gpt.add_adapter(PromptTuningConfig(31, prompt_tuning_init="RANDOM"), "three")
    assert 0.9 < weight_of(gpt, "three").std() < 1.1
    tokenizer = gptfast.tokenizer.CharTokenizer.train("abcd efgh")
    tokenizer.save(tmp_path)
    text: dict[str, Any] = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": str(tmp_path)}
    for n, wanted in ((3, "bad"), (7, "bad bad")):
        gpt.add_adapter(PromptTuningConfig(n, prompt_tuning_init_text="bad ", **text), f"text {n}")
        assert torch.equal(weight_of(gpt, f"text {n}"), gpt.wte.weight[tokenizer.encode(wanted)])


def test_half_precision_and_autocast_train():
    torch.manual_seed(0)
    half = gptfast.GPT(CONFIG).bfloat16()
    half.add_adapter(PromptTuningConfig(5))
    assert weight_of(half).dtype == torch.float32
    for gpt, autocast in ((half, False), (model(), True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gpt.train()(IDS, IDS)[1].backward()
        gradient = weight_of(gpt).grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
        assert all(p.grad is None for n, p in gpt.named_parameters() if "prompt_encoder" not in n)


def test_gradients_are_those_of_eager():
    gpt = model(CONFIG.replace(dropout=0.2)).train()
    gpt.dropout_seed, gradients = 3, []
    for backend in ("auto", "eager"):
        gpt.dropout_step = 5
        with gptfast.backend(backend):
            gpt(IDS, labels=IDS)[1].backward()
        gradients.append(weight_of(gpt).grad)
        gpt.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    gpt = model().train()
    gpt(IDS, IDS)[1].backward()
    expected = weight_of(gpt).grad
    gpt.zero_grad()
    for block in gpt.h:
        forward = block.forward
        block.forward = lambda *args, f=forward, **kw: checkpoint(
            lambda *a: f(*a, **kw), *args, use_reentrant=reentrant, preserve_rng_state=True
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt(IDS, IDS)[1].backward()
    assert torch.equal(weight_of(gpt).grad, expected)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_prompts():
    gpt = model(one=5, two=3).train()
    names = ["one", "__base__", "two"]
    expected = gpt(IDS, labels=IDS, adapter_names=names)[1]
    weight_of(gpt, "one").requires_grad_(True)
    loss = torch.compile(gpt, backend="aot_eager")(IDS, labels=IDS, adapter_names=names)[1]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert weight_of(gpt, "one").grad.any() and weight_of(gpt, "two").grad.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_those_without_padding(side: str):
    gpt = model(one=5, two=2)
    lengths = [20, 9, 0]
    names = ["one", "two", "one"]
    places = torch.arange(20)
    mask = torch.stack([(places < n) if side == "right" else (places >= 20 - n) for n in lengths])
    logits, loss = gpt(IDS, labels=IDS.masked_fill(~mask, -100), attention_mask=mask, adapter_names=names)
    last = gpt(IDS, attention_mask=mask, adapter_names=names, last_only=True)
    total, count = 0.0, 0
    for row, name in enumerate(names[:2]):
        alone, own = gpt(IDS[row, mask[row]][None], labels=IDS[row, mask[row]][None], adapter_names=[name])
        torch.testing.assert_close(logits[row, mask[row]], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last[row], alone[0, -1], rtol=1e-5, atol=1e-5)
        total, count = total + own * lengths[row], count + lengths[row]
    torch.testing.assert_close(loss, total / count)


def test_packed_texts_each_have_the_prompt():
    gpt = model()
    cu_seqlens = torch.tensor([0, 7, 8, 27, 60])[:4]
    row = IDS.view(1, -1)[:, :27]
    for training in (False, True):
        gpt.train(training)
        packed = gpt(row, labels=row, cu_seqlens=cu_seqlens)
        total = 0.0
        for first, last in pairwise(cu_seqlens):
            text = row[:, first:last]
            logits, loss = gpt(text, labels=text)
            total = total + loss * text.shape[1]  # every token of a text under a prompt is predicted
            if not training:
                torch.testing.assert_close(packed[0][:, first:last], logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed[1], total / 27)
    packed[1].backward()
    gradient = weight_of(gpt).grad.clone()
    gpt.zero_grad()
    (total / 27).backward()
    torch.testing.assert_close(gradient, weight_of(gpt).grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="5 virtual tokens and ids 28 positions, together 33, but block_size is 32"):
        gpt(IDS.view(1, -1)[:, :28], cu_seqlens=torch.tensor([0, 28]))


def mixed() -> tuple[gptfast.GPT, list[str], torch.Tensor]:
    gpt = model(short=2, long=9)
    gpt.add_adapter(LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False), "lora")
    gpt.add_adapter(LoraConfig(r=2, modules_to_save=["wte", "lm_head"], init_lora_weights=False), "copies")
    with torch.no_grad():
        gpt.wte.modules_to_save["copies"].weight.mul_(1.5)
    names = ["long", "lora", "__base__", "short", "short", "copies", "long"]
    return gpt, names, (torch.arange(7 * 20).view(7, 20) * 11 + 3) % 61


@pytest.mark.parametrize("training", [False, True])
def test_rows_of_a_mixed_batch_are_those_of_the_row_alone(training: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GPTFAST_GEMM", "own")
    gpt, names, ids = mixed()
    gpt.train(training)
    batch = gpt(ids, adapter_names=names)
    for row, name in enumerate(names):
        gpt.enable_adapters()
        assert torch.equal(batch[row], gpt(ids[row : row + 1], adapter_names=[name])[0])
        gpt.disable_adapters() if name == "__base__" else gpt.set_adapter(name)
        assert torch.equal(batch[row], gpt(ids[row : row + 1])[0])
    assert len({float(x.detach().sum()) for x in batch}) == len(names)


def test_a_mixed_batch_trains_every_adapter():
    gpt, names, ids = mixed()
    gpt.train()
    for p in gpt.parameters():
        p.requires_grad_(True)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    gpt(ids, labels=labels, adapter_names=names)[1].backward()
    gradients = {n: p.grad for n, p in gpt.named_parameters()}
    gpt.zero_grad()
    total, count = torch.zeros(()), 0
    for row, name in enumerate(names):
        own = labels[row, 1:] if name in ("lora", "copies", "__base__") else labels[row]
        n = int((own != -100).sum())
        total = total + n * gpt(ids[row : row + 1], labels=labels[row : row + 1], adapter_names=[name])[1]
        count += n
    (total / count).backward()
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)


def test_rows_under_adapters_that_are_not_trained_are_said():
    """The active ones are trained, and a row has one prompt; set_requires_grad trains others beside them."""
    gpt, names, ids = mixed()
    gpt.train()
    frozen = [name for name in dict.fromkeys(names) if name not in ("__base__", *gpt.active_adapters)]
    with pytest.warns(
        UserWarning, match=f"adapter_names has '{frozen[0]}'.*, which get no gradient.*set_requires_grad"
    ):
        gpt(ids, labels=ids, adapter_names=names)[1].backward()
    gpt.set_requires_grad(frozen)
    gpt(ids, labels=ids, adapter_names=names)[1].backward()
    own = [(n, p) for n, p in gpt.named_parameters() if p.requires_grad]
    assert {name for name in frozen if any(f".{name}." in n for n, _ in own)} == set(frozen)
    assert all(p.grad is not None for _, p in own)
    assert not any(p.requires_grad for n, p in gpt.named_parameters() if n in ("wte.weight", "ln_f.weight"))
    gpt.set_requires_grad(frozen, False)
    assert not any(p.requires_grad for n, p in gpt.named_parameters() if any(f".{name}." in n for name in frozen))
    with pytest.raises(ValueError, match="set_requires_grad: there is no adapter 'no'"):
        gpt.set_requires_grad(["no"])


def test_a_low_rank_update_beside_a_prompt():
    gpt, _, ids = mixed()
    gpt.set_adapter(["lora", "short"])
    both = gpt(ids)
    trained = {n for n, p in gpt.named_parameters() if p.requires_grad}
    assert any("lora_A.lora" in n for n in trained) and "prompt_encoder.short.embedding.weight" in trained
    gpt.delete_adapter(["copies", "long"])
    assert torch.equal(gpt(ids), both)
    with pytest.raises(ValueError, match="merge_adapter: 'short' is a soft prompt"):
        gpt.merge_adapter()
    gpt.merge_adapter("lora")
    merged = copy.deepcopy(gpt)
    assert not any("prompt_encoder" in n for n, _ in merged.named_parameters())
    for own in (gpt, merged):
        own.unmerge_adapter()
        assert torch.equal(own(ids), both)
    gpt.set_adapter("lora")
    merged.merge_adapter("lora")
    torch.testing.assert_close(merged(ids), gpt(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_prompt_learns_a_task():
    """A base that counts by ones or twos learns to count by twos from the first token on; its weights stay."""
    torch.manual_seed(0)
    gpt = gptfast.GPT(CONFIG).train()
    steps = torch.randint(1, 3, (64, 1))
    ids = (torch.randint(61, (64, 1)) + steps * torch.arange(17)) % 61
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=5e-3)
    for _ in range(120):
        gpt(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step(), optimizer.zero_grad()
    task = (torch.randint(61, (64, 1)) + 2 * torch.arange(3)) % 61

    def loss() -> torch.Tensor:
        return gpt(task[:, :-1], task[:, 1:])[1]

    bare, state = loss().item(), {k: v.clone() for k, v in gpt.state_dict().items()}
    gpt.add_adapter(PromptTuningConfig(4))
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=0.05)
    first = loss().item()
    for _ in range(60):
        loss().backward()
        optimizer.step(), optimizer.zero_grad()
    assert loss().item() < 0.7 * min(bare, first)
    assert all(torch.equal(gpt.state_dict()[k], v) for k, v in state.items())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({}, "num_virtual_tokens is None; expected an int"),
    "no tokens": ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; expected at least 1"),
    "unknown init": (
        {"num_virtual_tokens": 2, "prompt_tuning_init": "ZERO"},
        "'ZERO'; expected one of 'RANDOM', 'SAMP",
    ),
    "no text": ({"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text is None"),
    "no tokenizer": (
        {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
        "tokenizer_name_or_path is None",
    ),
    "copies": ({"num_virtual_tokens": 2, "modules_to_save": ["wte"]}, "modules_to_save"),
    "two stacks": ({"num_virtual_tokens": 2, "num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_config_refuses_is_named(case: str):
    options, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=f"PromptTuningConfig: .*{message}"):
        PromptTuningConfig(**options)


def test_what_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    gpt = gptfast.GPT(CONFIG).eval()
    before, text = gpt(IDS), {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b"}
    for config, error, message in (
        (PromptTuningConfig(32), ValueError, "num_virtual_tokens is 32 and the model's block_size 32"),
        (PromptTuningConfig(2, token_dim=64), ValueError, "token_dim is 64 and this model's width 32"),
        (PromptTuningConfig(2, tokenizer_name_or_path="gpt2", **text), ValueError, "token id .*, and the model has 61"),
        (
            PromptTuningConfig(2, tokenizer_name_or_path=str(tmp_path / "x"), **text),
            FileNotFoundError,
            "neither 'gpt2'",
        ),
    ):
        with pytest.raises(error, match=message):
            gpt.add_adapter(config)
        assert gpt.adapters is None and torch.equal(gpt(IDS), before)
        assert all(p.requires_grad for p in gpt.parameters())


def test_names_and_room_are_checked(tmp_path):
    gpt = model(one=5, two=13)
    for call, message in (
        (lambda: gpt.add_adapter(PromptTuningConfig(3), "one"), "there is an adapter 'one' already"),
        (lambda: gpt.add_adapter(LoraConfig(), "two"), "there is an adapter 'two' already"),
        (
            lambda: gpt.add_adapter(LoraConfig(target_modules=["embedding"]), "x"),
            "no module of this model is called so",
        ),
        (lambda: gpt.set_adapter(["one", "two"]), "set_adapter: 'one', 'two' are soft prompts"),
        (lambda: gpt.merge_adapter(), "merge_adapter: 'two' is a soft prompt"),
        (
            lambda: gpt(IDS),
            "13 virtual tokens and ids 20 positions, together 33, but block_size is 32; give at most 19",
        ),
        (lambda: gpt(IDS, adapter_names=["one", "two"]), "adapter_names has 2 names and the batch 3 rows"),
        (lambda: gpt(IDS, adapter_names=["one", "no", "two"]), "adapter_names has 'no'"),
        (lambda: gpt.save_pretrained(tmp_path / "no"), "the model has the soft prompt 'one', 'two' .save_adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert gpt.active_adapters == ["two"] and not (tmp_path / "no").exists()
    assert gpt(IDS, adapter_names=["one", "__base__", "one"]).shape == (3, 20, 61)
    gpt.delete_adapter(["one", "two"])
    gpt.save_pretrained(tmp_path / "base")
    assert torch.equal(gptfast.GPT.from_pretrained(tmp_path / "base")(IDS), gpt(IDS))


def test_copies_and_state_dicts():
    gpt = model(one=5, two=3)
    twin = copy.deepcopy(gpt)
    twin.set_adapter("one")
    assert gpt.active_adapters == ["two"] and not torch.equal(gpt(IDS), twin(IDS))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(gpt.state_dict())
    twin.set_adapter("two")
    assert torch.equal(gpt(IDS), twin(IDS))
