"""Soft prompts in peft's format, in both directions, and files that are no soft prompt of this model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptfast
from gptfast.backend import has_cpu_ops
from gptfast.finetuning import PromptTuningConfig, TaskModel

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

GPT2 = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
CONFIGS = {"gpt2": GPT2, "openai-gpt": GPT2.replace(norm_position="post", final_norm=False)}
IDS = torch.arange(3 * 20).view(3, 20) * 7 % 61
N = 6


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    torch.manual_seed(0)
    gptfast.GPT(CONFIGS[request.param]).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_round_trips_with_peft(base: Path, tmp_path: Path):
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path / "theirs")
    labels, mask = IDS.masked_fill(IDS % 9 == 0, -100), torch.ones_like(IDS)
    labels[1, 12:], mask[1, 12:] = -100, 0  # padding on the right
    expected = theirs(IDS, attention_mask=mask, labels=labels)
    gpt = gptfast.GPT.from_pretrained(base).train()
    before = gpt.eval()(IDS)
    gpt.load_adapter(tmp_path / "theirs")
    logits, loss = gpt(IDS, attention_mask=mask, labels=labels)
    shown = mask.bool()
    torch.testing.assert_close(logits[shown], expected.logits[:, N:][shown], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    assert (logits - before)[shown].abs().max() > 0.01
    loss = gpt.train()(IDS, attention_mask=mask, labels=labels)[1]
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    loss.backward(), expected.loss.backward()
    own = gpt.get_parameter("prompt_encoder.default.embedding.weight")
    torch.testing.assert_close(own.grad, theirs.get_parameter("prompt_encoder.default.embedding.weight").grad)
    gpt.eval().save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    assert torch.equal(again(IDS, attention_mask=mask).logits, expected.logits)
    files = {name: json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")}
    differing = {key for key in files["ours"] if files["ours"][key] != files["theirs"][key]}
    assert differing == set() and files["ours"]["peft_type"] == "PROMPT_TUNING"
    assert list(load_file(tmp_path / "ours/adapter_model.safetensors")) == ["prompt_embeddings"]
    assert (tmp_path / "ours/adapter_model.safetensors").stat().st_size < 2000


@pytest.mark.filterwarnings("ignore")
def test_round_trips_with_peft_beside_a_head(tmp_path: Path):
    torch.manual_seed(1)
    gptfast.GPT(GPT2).save_pretrained(tmp_path / "base")

    def classifier() -> Any:
        kind = transformers.GPT2ForSequenceClassification
        return kind.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0).eval()

    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N)
    theirs = peft.get_peft_model(classifier(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(IDS % 60 + 1).logits
    model = TaskModel.from_pretrained(tmp_path / "theirs", base=tmp_path / "base")
    torch.testing.assert_close(model(IDS % 60 + 1).logits, expected, rtol=1e-5, atol=1e-6)
    model.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    assert torch.equal(again(IDS % 60 + 1).logits, expected)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    gpt = gptfast.GPT(GPT2)
    gptfast.tokenizer.CharTokenizer.train("abc ").save(tmp_path / "tokenizer")
    text = {"prompt_tuning_init_text": "a cab", "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    gpt.add_adapter(PromptTuningConfig(N, "TEXT", **text))
    gpt.save_adapter(tmp_path / "a")
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()  # loading does not need it
    return tmp_path / "a"


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(folder: Path) -> None:
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


DAMAGES: dict[str, tuple[Any, str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "half written"),
    "cut": (cut, "damaged or cut short"),
    "half JSON": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "PRO'), "not valid JSON"),
    "no prompt": (lambda f: save_file({}, f / "adapter_model.safetensors"), "prompt_embeddings is missing"),
    "more than the prompt": (
        lambda f: save_file(
            {"prompt_embeddings": torch.ones(N, 32), "x": torch.ones(1)}, f / "adapter_model.safetensors"
        ),
        "x is unexpected",
    ),
    "nan": (
        lambda f: save_file(
            {"prompt_embeddings": torch.ones(N, 32).fill_diagonal_(torch.nan)}, f / "adapter_model.safetensors"
        ),
        r"adapter_model\.safetensors: prompt_embeddings holds nan or infinities",
    ),
    "another length": (lambda f: change(f, num_virtual_tokens=4), r"is \(6, 32\) and the configuration says 4"),
    "another width": (
        lambda f: save_file({"prompt_embeddings": torch.ones(N, 64)}, f / "adapter_model.safetensors"),
        r"is \(6, 64\) and this model's width 32",
    ),
    "no room": (
        lambda f: (
            change(f, num_virtual_tokens=40),
            save_file({"prompt_embeddings": torch.ones(40, 32)}, f / "adapter_model.safetensors"),
        ),
        "num_virtual_tokens is 40 and the model's block_size 32",
    ),
    "another method": (
        lambda f: change(f, peft_type="P_TUNING"),
        "peft_type is 'P_TUNING'; gptfast has LORA and PROMPT",
    ),
    "another field": (lambda f: change(f, encoder_dropout=0.5), "encoder_dropout is 0.5"),
    "unknown init": (lambda f: change(f, prompt_tuning_init="ZERO"), "'ZERO'; expected one of"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_prompts_leave_the_model_as_it_was(case: str, saved: Path):
    damage, message = DAMAGES[case]
    damage(saved)
    torch.manual_seed(0)
    gpt = gptfast.GPT(GPT2).eval()
    gpt.add_adapter(PromptTuningConfig(3), "mine")
    before, rng = gpt(IDS), torch.get_rng_state()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gpt.load_adapter(saved, "new")
    assert torch.equal(gpt(IDS), before) and gpt.active_adapters == ["mine"]
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
@pytest.mark.parametrize("case", ["no prompt", "more than the prompt", "nan", "another length", "another width"])
def test_damaged_prompts_leave_a_packed_model_as_it_was(case: str, saved: Path):
    damage, message = DAMAGES[case]
    damage(saved)
    torch.manual_seed(0)
    packed = gptfast.GPT(GPT2).eval().compile_for_inference("float32")
    with pytest.raises(ValueError, match=message):
        packed.load_adapter(saved)
    assert packed.adapters == ()


def test_a_prompt_of_another_base_is_refused(saved: Path):
    torch.manual_seed(5)
    other = gptfast.GPT(GPT2)
    with pytest.raises(ValueError, match="trained on another base"):
        other.load_adapter(saved)
    other.load_adapter(saved, any_base=True)
    torch.manual_seed(0)
    gpt = gptfast.GPT(GPT2).bfloat16().eval()  # the same base
    gpt.load_adapter(saved, "one")
    gpt.load_adapter(saved, "two")
    assert torch.equal(gpt(IDS, adapter_names=["one"] * 3), gpt(IDS, adapter_names=["two"] * 3))
    with pytest.raises(ValueError, match="there is an adapter 'one' already"):
        gpt.load_adapter(saved, "one")
    with pytest.raises(ValueError, match=r"\(6, 32\) and this model's width 64"):
        gptfast.GPT(GPT2.replace(n_embd=64)).load_adapter(saved, any_base=True)


def test_peft_configs_are_taken():
    gpt = gptfast.GPT(GPT2)
    gpt.add_adapter(peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert gpt.prompt_encoder["default"].embedding.weight.std() > 0.5  # peft's default is RANDOM
    with pytest.raises(ValueError, match="peft_type is 'P_TUNING'"):
        gpt.add_adapter(peft.PromptEncoderConfig(num_virtual_tokens=3), "other")
