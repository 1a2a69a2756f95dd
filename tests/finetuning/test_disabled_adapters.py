"""While adapters are disabled no row has one, whatever adapter_names say, as in peft."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import gptfast
from gptfast.backend import has_cpu_ops
from gptfast.finetuning import LoraConfig, PromptTuningConfig
from gptfast.generation import Scheduler, TorchRunner, score

CONFIG = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
IDS = torch.arange(3 * 10).view(3, 10) * 7 % 61
NAMES = ["lora", "prompt", "copy"]


@pytest.fixture(params=["auto", "eager"])  # with and without the native engine
def gpt(request: pytest.FixtureRequest) -> Iterator[gptfast.GPT]:
    gpt = made()
    if request.param == "auto":  # a copy of an embedding does not fit beside a packed base
        gpt.delete_adapter("copy")
    gpt.disable_adapters()
    with gptfast.backend(request.param):
        assert not has_cpu_ops or isinstance(gpt.runner(1, 8), TorchRunner) == (request.param == "eager")
        yield gpt


def made() -> gptfast.GPT:
    torch.manual_seed(0)
    gpt = gptfast.GPT(CONFIG).eval()
    gpt.add_adapter(LoraConfig(target_modules=["c_attn"], init_lora_weights=False), "lora")
    gpt.add_adapter(LoraConfig(target_modules=["c_fc"], modules_to_save=["wte"]), "copy")
    gpt.wte.modules_to_save["copy"].weight.data.mul_(2)
    gpt.add_adapter(PromptTuningConfig(9, prompt_tuning_init="RANDOM"), "prompt")
    return gpt


def test_a_forward_is_that_of_the_base():
    gpt = made()
    named = gpt(IDS, adapter_names=NAMES)
    gpt.disable_adapters()
    base = gpt(IDS)
    assert not any(torch.equal(*rows) for rows in zip(base, named, strict=True))
    assert torch.equal(gpt(IDS, adapter_names=NAMES), base)
    assert torch.equal(gpt.hidden_states(IDS, adapter_names=NAMES), gpt.hidden_states(IDS))
    vectors = torch.ones(3, 2, 32)
    assert torch.equal(gpt(IDS, adapter_names=NAMES, prefix_embeds=vectors), gpt(IDS, prefix_embeds=vectors))
    gpt.enable_adapters()
    assert torch.equal(gpt(IDS, adapter_names=NAMES), named)


def test_names_are_checked_all_the_same():
    gpt = made()
    gpt.disable_adapters()
    with pytest.raises(ValueError, match="adapter_names has 'no'"):
        gpt(IDS, adapter_names=["lora", "no", "lora"])
    with pytest.raises(ValueError, match="adapter_names has 1 names and the batch 3 rows"):
        gpt(IDS, adapter_names=["lora"])


def test_training_says_that_nothing_is_trained():
    gpt = made().train()
    gpt.disable_adapters()
    with pytest.warns(UserWarning, match="depends on no trained parameter"):
        gpt(IDS, IDS, adapter_names=NAMES)


def test_generate_and_scores_are_those_of_the_base(gpt: gptfast.GPT):
    prompts = [row[:5].tolist() for row in IDS[:2]]
    names = ["lora", "prompt"]
    for options in ({}, {"num_beams": 2}, {"seed": 1}):
        assert gpt.generate(prompts, 8, adapter_names=names, **options) == gpt.generate(prompts, 8, **options)
    assert [score(gpt, prompts[0], adapter=name) for name in names] == [score(gpt, prompts[0])] * 2
    assert len(gpt.generate([[1] * 31], 1, adapter_names=["prompt"])[0]) == 32, "the prompt takes no room"
    assert Scheduler(gpt, 1).submit([1] * 31, max_new_tokens=1, adapter="prompt").max_len == 32
    with pytest.raises(ValueError, match="adapter_names has 'no'"):
        gpt.generate(prompts, 1, adapter_names=["lora", "no"])


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
def test_a_compiled_model_is_the_base():
    gpt = made()
    gpt.delete_adapter("copy")
    compiled = gpt.compile_for_inference("float32")
    names = ["lora", "prompt", "lora"]
    named, base = compiled.logits(IDS, names), compiled.logits(IDS, ["__base__"] * 3)
    compiled.disable_adapters()
    assert torch.equal(compiled.logits(IDS, names), base)
    assert compiled.virtual_tokens("prompt") == 0
    texts = compiled.generate(IDS, 6, adapter_names=names)
    assert torch.equal(texts, compiled.generate(IDS, 6))
    with pytest.raises(ValueError, match="adapter_names has 'no'"):
        compiled.logits(IDS, ["no"] * 3)
    gpt.disable_adapters()
    assert torch.equal(gpt.compile_for_inference("float32").logits(IDS, names), base), "packed while disabled"
    compiled.enable_adapters()
    assert torch.equal(compiled.logits(IDS, names), named)


@pytest.mark.filterwarnings("ignore")
def test_peft_ignores_names_while_disabled_too(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    gpt = made()
    gpt.delete_adapter(["copy", "prompt"])
    gpt.save_adapter(tmp_path / "lora", "lora")
    gpt.delete_adapter("lora")
    gpt.save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "lora", "lora").eval()
    gpt.load_adapter(tmp_path / "lora", "lora")
    gpt.disable_adapters()
    with theirs.disable_adapter():
        expected = theirs(IDS, adapter_names=["lora"] * 3).logits
    torch.testing.assert_close(gpt(IDS, adapter_names=["lora"] * 3), expected, rtol=1e-5, atol=1e-5)
