"""Soft prompts of a base with rows for new tokens, which are in no checkpoint of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gptfast
from gptfast.backend import has_cpu_ops
from gptfast.checkpoints.adapter_files import embedding_rows
from gptfast.finetuning import LoraConfig, PromptTuningConfig
from gptfast.generation import TorchRunner

CONFIG = gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
CONFIGS = {
    "tied": CONFIG,
    "untied": CONFIG.replace(tie_weights=False),
    "openai-gpt": CONFIG.replace(norm_position="post", final_norm=False),
}
IDS = (torch.arange(3 * 12).view(3, 12) * 7 + 50) % 64
V = 64
assert (IDS >= 61).any(), "the tests need new tokens"


@pytest.fixture(params=CONFIGS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    gptfast.GPT(CONFIGS[request.param]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base: Path, seed: int) -> gptfast.GPT:
    gpt = gptfast.GPT.from_pretrained(base)
    torch.manual_seed(seed)
    gpt.resize_token_embeddings(V)
    return gpt


def prompted(base: Path, seed: int = 1) -> gptfast.GPT:
    gpt = resized(base, seed)
    gpt.add_adapter(PromptTuningConfig(4, prompt_tuning_init="RANDOM"))
    return gpt


def test_rows_of_new_tokens_are_saved_and_loaded(base: Path, tmp_path: Path):
    gpt = prompted(base)
    gpt.save_adapter(tmp_path / "a")
    assert embedding_rows(tmp_path / "a") == V, "by which the command line makes room"
    with pytest.raises(ValueError, match=r"call model\.resize_token_embeddings\(64\) first"):
        gptfast.GPT.from_pretrained(base).load_adapter(tmp_path / "a")
    again = resized(base, 2)
    own = again(IDS)
    again.load_adapter(tmp_path / "a")
    assert torch.equal(again(IDS), gpt(IDS))
    assert torch.equal(again.generate(IDS[:, :5], 6), gpt.generate(IDS[:, :5], 6))
    assert torch.equal(again(IDS, adapter_names=["__base__"] * 3), own), "the base keeps its own"
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert trained == ["prompt_encoder.default.embedding.weight"]
    again.save_adapter(tmp_path / "b")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    again.delete_adapter("default")
    assert torch.equal(again(IDS), own)


def test_prompts_with_rows_of_their_own_stand_side_by_side(base: Path, tmp_path: Path):
    expected = []
    for seed in (1, 2):
        gpt = prompted(base, seed)
        gpt.save_adapter(tmp_path / str(seed))
        expected.append(gpt(IDS[:1]))
    gpt = resized(base, 3)
    for seed in (1, 2):
        gpt.load_adapter(tmp_path / str(seed), str(seed))
    mixed = gpt(IDS[:1].repeat(2, 1), adapter_names=["1", "2"])
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
def test_the_engine_has_them_where_they_are_the_rows_of_the_base(tmp_path: Path):
    torch.manual_seed(0)
    gptfast.GPT(CONFIG).save_pretrained(tmp_path / "base")
    gpt = prompted(tmp_path / "base")
    gpt.save_adapter(tmp_path / "a")
    gpt.load_adapter(tmp_path / "a", "again")
    assert torch.equal(gpt(IDS, adapter_names=["again"] * 3), gpt(IDS, adapter_names=["default"] * 3))
    assert not isinstance(gpt.runner(1, 8), TorchRunner)
    packed = gpt.compile_for_inference("int8")
    with pytest.raises(ValueError, match=r"holds wte\.weight, with rows for new tokens"):
        packed.load_adapter(tmp_path / "a", "third")
    other = resized(tmp_path / "base", 2)
    other.load_adapter(tmp_path / "a")
    assert isinstance(other.runner(1, 8), TorchRunner)
    with pytest.raises(ValueError, match="'default' has a copy of its own of wte"):
        other.compile_for_inference("int8")


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_and_writes_them(base: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def theirs() -> object:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(V)
        return model

    gpt = prompted(base)
    gpt.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits[:, 4:], gpt(IDS), rtol=1e-5, atol=1e-5)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trained = peft.get_peft_model(theirs(), config).eval()
    trained.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    gpt = resized(base, 5)
    gpt.load_adapter(tmp_path / "theirs")
    torch.testing.assert_close(gpt(IDS), trained(IDS).logits[:, 4:], rtol=1e-5, atol=1e-5)


def test_beside_a_low_rank_update_of_the_head(base: Path, tmp_path: Path):
    gpt = prompted(base)
    gpt.add_adapter(LoraConfig(target_modules=["c_attn", "lm_head"], init_lora_weights=False), "lora")
    gpt.save_adapter(tmp_path / "lora", "lora")
    gpt.set_adapter(["lora", "default"])
    gpt.save_adapter(tmp_path / "prompt")
    keys = set(load_file(tmp_path / "lora/adapter_model.safetensors"))
    assert any(key.endswith("lm_head.base_layer.weight") for key in keys)
    prompt = load_file(tmp_path / "prompt/adapter_model.safetensors")
    assert len(prompt) == (2 if gpt.config.tie_weights else 3)
    other = resized(base, 2)
    other.add_adapter(LoraConfig(target_modules=["lm_head"]), "lora")
    before = other(IDS)
    with pytest.raises(ValueError, match="rows of new tokens for lm_head, of which 'lora' has low-rank updates"):
        other.load_adapter(tmp_path / "prompt")
    assert torch.equal(other(IDS), before) and other.active_adapters == ["lora"]
