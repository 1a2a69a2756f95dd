"""The checkpoint that an adapter's file names as its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gptfast
from gptfast._folders import staged_folder
from gptfast.finetuning import LoraConfig, PromptTuningConfig, TaskModel

CONFIG = gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
IDS = torch.arange(2 * 9).view(2, 9) * 7 % 61
LORA = {"target_modules": ["c_attn"], "init_lora_weights": False}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    gptfast.GPT(CONFIG).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def named(gpt: gptfast.GPT, folder: Path) -> str | None:
    gpt.save_adapter(folder)
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_peft_finds_the_base_of_an_adapter(kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    gpt = gptfast.GPT.from_pretrained("base")
    gpt.add_adapter(
        LoraConfig(task_type="CAUSAL_LM", **LORA)
        if kind == "lora"
        else PromptTuningConfig(3, prompt_tuning_init="RANDOM")
    )
    assert named(gpt, tmp_path / "a") == str(base.resolve())
    monkeypatch.chdir("/")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(theirs(IDS).logits[:, -9:], gpt(IDS), rtol=1e-5, atol=1e-5)


def test_what_a_configuration_names_stays_and_an_unknown_base_is_null(base: Path, tmp_path: Path):
    gpt = gptfast.GPT(CONFIG)
    gpt.add_adapter(LoraConfig(**LORA))
    assert named(gpt, tmp_path / "a") is None
    gpt = gptfast.GPT.from_pretrained(base)
    gpt.add_adapter(LoraConfig(base_model_name_or_path="somebody/model", **LORA))
    assert named(gpt, tmp_path / "a") == "somebody/model"


def test_the_checkpoint_that_was_written_last_is_the_base(base: Path, tmp_path: Path):
    gpt = gptfast.GPT.from_pretrained(base)
    gpt.h[0].attn.c_attn.weight.data.add_(1.0)
    gpt.save_pretrained(tmp_path / "trained")
    gpt.add_adapter(LoraConfig(**LORA))
    assert named(gpt, tmp_path / "a") == str((tmp_path / "trained").resolve())
    gptfast.GPT.from_pretrained(tmp_path / "trained").load_adapter(tmp_path / "a")


def test_a_checkpoint_within_another_save_is_where_it_will_be(tmp_path: Path):
    """As training writes its checkpoints."""
    gpt = gptfast.GPT(CONFIG)
    with staged_folder(tmp_path / "best") as stage:
        gpt.save_pretrained(stage)
    gpt.add_adapter(LoraConfig(**LORA))
    assert named(gpt, tmp_path / "a") == str((tmp_path / "best").resolve())


def test_a_merged_checkpoint_is_not_the_base(base: Path, tmp_path: Path):
    """Its rows of new tokens are in no checkpoint of the base either."""
    gpt = gptfast.GPT.from_pretrained(base)
    gpt.resize_token_embeddings(63)
    gpt.add_adapter(LoraConfig(**LORA))
    gpt.merge_adapter()
    gpt.save_pretrained(tmp_path / "merged")
    gpt.unmerge_adapter()
    assert named(gpt, tmp_path / "a") == str(base.resolve())
    assert "base_model.model.transformer.wte.weight" in load_file(tmp_path / "a/adapter_model.safetensors")


def test_a_task_adapter_finds_its_base(base: Path, tmp_path: Path):
    model = TaskModel.from_pretrained(base, task="classification", labels=["no", "yes"], special_tokens={"pad": 0})
    model.gpt.add_adapter(LoraConfig(**LORA))
    model.save_adapter(tmp_path / "a")
    again = TaskModel.from_pretrained(tmp_path / "a")
    assert torch.equal(again(IDS + 1).logits, model(IDS + 1).logits)
