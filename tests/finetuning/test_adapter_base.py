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


def test_the_revision_of_a_base_is_kept_and_fetched(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As peft's AutoPeftModel."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model = TaskModel.from_pretrained(base, task="classification", labels=["no", "yes"], special_tokens={"pad": 0})
    model.gpt.add_adapter(LoraConfig(base_model_name_or_path="some/model", revision="v2", **LORA))
    model.save_adapter(tmp_path / "a")
    asked = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    again = TaskModel.from_pretrained(tmp_path / "a")
    assert asked == [("some/model", "v2")] and again.gpt.name_or_path == "some/model"
    assert torch.equal(again(IDS + 1).logits, model(IDS + 1).logits)
    again.save_adapter(tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["revision"] == "v2"


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_peft_reads_the_revision_and_gptfast_that_of_peft(kind: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig if kind == "lora" else peft.PromptTuningConfig
    size = {"target_modules": ["c_attn"]} if kind == "lora" else {"num_virtual_tokens": 3}
    gpt = gptfast.GPT(CONFIG)
    gpt.add_adapter(config(revision="v2", base_model_name_or_path="some/model", **size))
    gpt.save_adapter(tmp_path / "a")
    gpt.load_adapter(tmp_path / "a", "again")
    gpt.save_adapter(tmp_path / "b", "again")
    assert peft.PeftConfig.from_pretrained(tmp_path / "b").revision == "v2"


@pytest.mark.parametrize("task", ["classification", "choice"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_a_task_is_the_base_of_its_adapter(task: str, tied: bool, tmp_path: Path):
    """As transformers' ForSequenceClassification is in peft; its head is replaced by the adapter's."""
    torch.manual_seed(0)
    labels = {"labels": ["no", "yes"]} if task == "classification" else {}
    gpt = gptfast.GPT(CONFIG.replace(tie_weights=tied))
    TaskModel(gpt, task, special_tokens={"pad": 0}, **labels).save_pretrained(tmp_path / "task")
    model = TaskModel.from_pretrained(tmp_path / "task")
    model.gpt.add_adapter(LoraConfig(**LORA))
    torch.nn.init.normal_(model.score.weight)
    model.save_adapter(tmp_path / "a")
    raw = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str((tmp_path / "task").resolve())
    again = TaskModel.from_pretrained(tmp_path / "a")
    ids = IDS % 60 + 1 if task == "classification" else IDS[:, None].repeat(1, 2, 1) % 60 + 1
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.gpt.name_or_path == raw["base_model_name_or_path"]
    assert again.gpt.metadata.config.keys() == model.gpt.metadata.config.keys()


def test_the_checkpoint_of_a_task_that_was_written_last_is_the_base(base: Path, tmp_path: Path):
    model = TaskModel.from_pretrained(base, task="classification", labels=["no", "yes"], special_tokens={"pad": 0})
    model.gpt.h[0].attn.c_attn.weight.data.add_(1.0)
    model.save_pretrained(tmp_path / "task")
    model.gpt.add_adapter(LoraConfig(**LORA))
    model.save_adapter(tmp_path / "a")
    again = TaskModel.from_pretrained(tmp_path / "a")
    assert torch.equal(again(IDS + 1).logits, model(IDS + 1).logits)
