"""Task models with adapters: their folders both ways, with peft's own model too, and merging."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gptfast import GPT
from gptfast.finetuning import LoraConfig, PromptTuningConfig, TaskModel
from tests.finetuning.models import EXAMPLES, LABELS, gpt, tokenizer

EVERYWHERE = ["c_attn", "c_proj", "c_fc"]
QUIET = {**dict.fromkeys(("bos", "sep", "eos"), None), "pad": 0}  # rows as transformers' models have them


def adapted(folder, task: str, special_tokens=None, kind: str = "bpe") -> TaskModel:
    """A task model whose adapter and head are random, on a base in folder/base."""
    used = tokenizer(kind)
    made = gpt(used.vocab_size)
    made.save_pretrained(folder / "base")
    used.save(folder / "base")
    torch.manual_seed(5)
    model = TaskModel(made, task, labels=LABELS.get(task), tokenizer=used, special_tokens=special_tokens)
    made.add_adapter(LoraConfig(r=4, target_modules=EVERYWHERE, base_model_name_or_path=str(folder / "base")))
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("task", list(EXAMPLES))
def test_an_adapter_and_its_head_come_back(tmp_path, task):
    model = adapted(tmp_path, task)
    said = model.predict(EXAMPLES[task])
    model.save_adapter(tmp_path / "adapter")
    names = {f.name for f in (tmp_path / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "task_config.json",
        "special_tokens.safetensors",
    } <= names
    assert not {"config.json", "model.safetensors"} & names
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("wte" in key or "ln_" in key for key in stored)
    back = TaskModel.from_pretrained(tmp_path / "adapter")
    assert (back.task, back.labels, back.special_tokens) == (task, model.labels, model.special_tokens)
    assert back.gpt.active_adapters == ["default"]
    assert back.predict(EXAMPLES[task]) == said
    trained = {n for n, p in back.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.startswith("score.") for n in trained)


def test_a_merged_task_model_is_saved_whole(tmp_path):
    model = adapted(tmp_path, "classification")
    with pytest.raises(ValueError, match="save_pretrained"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / "config.json").exists()
    said = model.predict(EXAMPLES["classification"])
    model.gpt.merge_adapter()
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="merged"):
        model.save_adapter(tmp_path / "adapter")
    back = TaskModel.from_pretrained(tmp_path / "whole")
    assert back.gpt.adapters is None
    for a, b in zip(said, back.predict(EXAMPLES["classification"]), strict=True):
        assert list(a.probabilities.values()) == pytest.approx(list(b.probabilities.values()), abs=1e-5)
    model.gpt.unmerge_adapter()
    assert model.predict(EXAMPLES["classification"]) == said


@pytest.mark.parametrize(("task", "classes"), [("classification", 2), ("similarity", 1)])
def test_peft_computes_the_same_logits(tmp_path, task, classes):
    model = adapted(tmp_path, task, QUIET)
    model.save_adapter(tmp_path / "adapter")
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=classes, pad_token_id=0
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = torch.randint(1, 200, (3, 9))
    with torch.no_grad():
        wanted = theirs(ids).logits
        rows = ids[:, None].expand(3, 2, 9) if task == "similarity" else ids
        ours = model(rows).logits
    wanted = 2 * wanted[:, 0] if task == "similarity" else wanted  # ours adds both orders
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_folder_of_peft_is_a_task_model(tmp_path):
    used = tokenizer("bpe")
    gpt(used.vocab_size).save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=0)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=EVERYWHERE, r=4, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = TaskModel.from_pretrained(tmp_path / "theirs", special_tokens=QUIET)
    assert (model.task, model.labels) == ("classification", ["LABEL_0", "LABEL_1", "LABEL_2"])
    ids = torch.randint(1, 200, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="4 labels"):
        TaskModel.from_pretrained(tmp_path / "theirs", labels=list("abcd"), special_tokens=QUIET)


def test_a_gpt_takes_the_adapter_without_the_head(tmp_path):
    adapted(tmp_path, "classification").save_adapter(tmp_path / "adapter")
    plain = GPT.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="head of a task"):
        plain.load_adapter(tmp_path / "adapter")
    assert plain.active_adapters == ["default"]


def test_the_base_is_found_or_asked_for(tmp_path):
    model = adapted(tmp_path, "entailment")
    said = model.predict(EXAMPLES["entailment"])
    model.save_adapter(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"is an adapter of .*base=") as failure:
        TaskModel.from_pretrained(tmp_path / "adapter")
    assert str(tmp_path / "base") in str(failure.value)
    assert (
        TaskModel.from_pretrained(tmp_path / "adapter", base=tmp_path / "moved").predict(EXAMPLES["entailment"]) == said
    )
    gpt(tokenizer("bpe").vocab_size, n_embd=16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="load its own base"):
        TaskModel.from_pretrained(tmp_path / "adapter", base=tmp_path / "other")
    with pytest.raises(ValueError, match="no folder of an adapter"):
        TaskModel.from_pretrained(tmp_path / "moved", task="choice", base=tmp_path / "moved")


def spoil(file, key: str) -> None:
    tensors = load_file(file)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file)


@pytest.mark.parametrize(
    "damage", ["labels", "one label twice", "rows", "cut rows", "half", "rows of nan", "a head of nan"]
)
def test_damaged_folders_are_refused(tmp_path, damage):
    adapted(tmp_path, "classification").save_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "task_config.json"
    raw = json.loads(file.read_text())
    if damage == "labels":
        file.write_text(json.dumps({**raw, "labels": ["a", "b", "c"]}))
    elif damage == "one label twice":
        file.write_text(json.dumps({**raw, "labels": ["a", "a"]}))
    elif damage == "cut rows":
        rows = tmp_path / "adapter" / "special_tokens.safetensors"
        rows.write_bytes(rows.read_bytes()[:-4])
    elif damage == "rows":
        save_file({"wte": torch.zeros(1, 7)}, tmp_path / "adapter" / "special_tokens.safetensors")
    elif damage == "rows of nan":
        spoil(tmp_path / "adapter" / "special_tokens.safetensors", "wte")
    elif damage == "a head of nan":
        spoil(tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.score.weight")
    else:
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    said = r".*(wte|score\.weight) holds nan" if "nan" in damage else ""
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path / "adapter") + said):
        TaskModel.from_pretrained(tmp_path / "adapter")


CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False),
    "prompt": PromptTuningConfig(3, prompt_tuning_init="RANDOM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_base_that_had_new_tokens_before_those_of_the_task(tmp_path, kind):
    """The adapter's file holds their rows, and the folder is read on the base without them."""
    gpt(40).save_pretrained(tmp_path / "base")
    made = GPT.from_pretrained(tmp_path / "base")
    made.resize_token_embeddings(47)  # more than the task has delimiters
    model = TaskModel(made, "classification", ["no", "yes"]).eval()
    made.add_adapter(CONFIGS[kind])
    ids = torch.arange(made.config.vocab_size - 12, made.config.vocab_size)[None]
    model.save_adapter(tmp_path / "a")
    back = TaskModel.from_pretrained(tmp_path / "a")
    assert torch.equal(back(ids).logits, model(ids).logits)
    back.save_adapter(tmp_path / "b")
    again = TaskModel.from_pretrained(tmp_path / "b")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gpt_of_a_task_saves_the_rows_of_its_delimiters(tmp_path, kind):
    gpt(40).save_pretrained(tmp_path / "base")
    made = GPT.from_pretrained(tmp_path / "base")
    model = TaskModel(made, "classification", ["no", "yes"]).eval()
    made.add_adapter(CONFIGS[kind])
    model.save_adapter(tmp_path / "task")
    again = TaskModel.from_pretrained(tmp_path / "task").gpt
    V = made.config.vocab_size
    ids = torch.arange(V - 8, V)[None]
    for n, network in enumerate((made, again)):
        network.save_adapter(tmp_path / f"alone {n}")
        alone = GPT.from_pretrained(tmp_path / "base")
        alone.resize_token_embeddings(V)
        alone.load_adapter(tmp_path / f"alone {n}")
        assert torch.equal(alone(ids), made(ids))
