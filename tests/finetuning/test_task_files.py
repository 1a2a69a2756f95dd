"""Checkpoints of task models, beside transformers: the same logits both ways."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from torch import Tensor

from gptfast import GPT
from gptfast.finetuning import TaskModel, task_files
from gptfast.models import export
from gptfast.tokenizer import load_tokenizer
from tests.finetuning.models import EXAMPLES, LABELS, bpe, gpt, task_model
from tests.support.hf_models import T, V, hf_model, padded

KINDS = {"gpt2": "GPT2", "openai-gpt": "OpenAIGPT"}


def hf_logits(model: TaskModel, peer: torch.nn.Module, ids: Tensor) -> Tensor:
    """transformers' logits for the rows that ours is given."""
    with torch.no_grad():
        if model.task == "choice":
            places = (ids != model.special_tokens["pad"]).sum(-1) - 1
            return peer(input_ids=ids, mc_token_ids=places).mc_logits
        logits = peer(input_ids=ids.flatten(0, -2)).logits
        return logits.view(-1, 2).sum(1) if model.task == "similarity" else logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", EXAMPLES)
def test_transformers_loads_what_was_saved(tmp_path, task, kind):
    model = task_model(task, "openai-gpt" if kind == "openai-gpt" else "bpe")
    model.save_pretrained(tmp_path)
    name = KINDS[kind] + ("DoubleHeadsModel" if task == "choice" else "ForSequenceClassification")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [name]
    assert config["pad_token_id"] == model.special_tokens["pad"]
    peer, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch = model.batch(EXAMPLES[task])
    logits = model(**batch).logits.detach()
    torch.testing.assert_close(logits, hf_logits(model, peer.eval(), batch["ids"]), atol=2e-5, rtol=1e-5)
    labels = LABELS.get(task)
    if labels:
        assert peer.config.id2label == dict(enumerate(labels))
        assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).num_labels == len(labels)
    again = TaskModel.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, logits)
    assert (again.task, again.labels, again.special_tokens) == (task, labels or [], model.special_tokens)
    assert again.encode(EXAMPLES[task][0]) == model.encode(EXAMPLES[task][0])
    assert not again.training


@pytest.mark.parametrize("task", ["classification", "choice"])
def test_a_llama_with_a_head(tmp_path, task):
    llama = {"norm": "rms_norm", "position_embedding": "rotary", "activation": "swiglu", "bias": False}
    model = task_model(task, "bpe", **llama, n_kv_head=1)
    model.save_pretrained(tmp_path)
    batch = model.batch(EXAMPLES[task])
    logits = model(**batch).logits.detach()
    assert torch.equal(TaskModel.from_pretrained(tmp_path)(**batch).logits, logits)
    if task == "choice":
        return
    peer, info = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"], info
    torch.testing.assert_close(logits, hf_logits(model, peer.eval(), batch["ids"]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_saved_is_loaded(tmp_path, kind):
    names = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
    peer = hf_model(f"{KINDS[kind]}ForSequenceClassification", **names)
    peer.save_pretrained(tmp_path)
    model = TaskModel.from_pretrained(tmp_path)
    assert (model.task, model.labels) == ("classification", ["bad", "fine", "good"])
    assert model.special_tokens == {"bos": None, "sep": None, "eos": None, "pad": 0}
    ids, _ = padded("right")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, peer(input_ids=ids).logits, atol=2e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    again = type(peer).from_pretrained(tmp_path / "ours")
    assert again.config.id2label == names["id2label"]
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in peer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_double_heads_of_transformers_are_loaded(tmp_path, kind):
    peer = hf_model(f"{KINDS[kind]}DoubleHeadsModel")
    peer.save_pretrained(tmp_path)
    model = TaskModel.from_pretrained(tmp_path)
    assert model.task == "choice"
    torch.manual_seed(1)
    ids, places = torch.randint(3, V, (3, 2, T)), torch.randint(0, T, (3, 2))
    with torch.no_grad():
        wanted = peer(input_ids=ids, mc_token_ids=places)
        found = model(ids, mc_token_ids=places).logits
        torch.testing.assert_close(found, wanted.mc_logits, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.gpt(ids.flatten(0, 1)).view_as(wanted.logits), wanted.logits, atol=2e-5, rtol=1e-5
        )
        assert torch.equal(found, TaskModel.from_pretrained(tmp_path, task="choice")(ids, mc_token_ids=places).logits)


def test_regression_and_default_labels_of_transformers(tmp_path):
    hf_model("GPT2ForSequenceClassification", num_labels=1).save_pretrained(tmp_path / "one")
    assert TaskModel.from_pretrained(tmp_path / "one").task == "similarity"
    hf_model("GPT2ForSequenceClassification").save_pretrained(tmp_path / "two")
    assert TaskModel.from_pretrained(tmp_path / "two").labels == ["LABEL_0", "LABEL_1"]
    renamed = TaskModel.from_pretrained(tmp_path / "two", task="entailment", labels=["no", "yes"])
    assert (renamed.task, renamed.labels) == ("entailment", ["no", "yes"])


def test_a_language_model_gets_a_new_head(tmp_path):
    used = bpe()
    model = gpt(used.vocab_size)
    model.save_pretrained(tmp_path)
    used.save(tmp_path)
    task = TaskModel.from_pretrained(tmp_path, task="classification", labels=["a", "b"], dropout=0.3)
    assert task.tokenizer.encode("the cat") == used.encode("the cat")
    assert task.gpt.config.resid_pdrop == 0.3
    assert torch.equal(task.gpt.wte.weight[: used.vocab_size], model.wte.weight)
    with pytest.raises(ValueError, match="is a language model without a head; say which one it gets with task="):
        TaskModel.from_pretrained(tmp_path)


def test_what_a_task_says_is_not_left_in_the_gpt(tmp_path):
    model = task_model("classification")
    model.gpt.metadata.config["note"] = "kept"
    model.save_pretrained(tmp_path / "task")
    again = TaskModel.from_pretrained(tmp_path / "task")
    again.gpt.save_pretrained(tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    assert config["note"] == "kept"
    assert not {"id2label", "problem_type", task_files.SETTINGS} & config.keys()
    assert GPT.from_pretrained(tmp_path / "lm").config == again.gpt.config


def test_models_without_a_class_in_transformers(tmp_path):
    model = task_model("choice", "word", attention_pattern="alternating", window=4, tie_weights=False)
    model.save_pretrained(tmp_path)
    batch = model.batch(EXAMPLES["choice"])
    again = TaskModel.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    assert load_tokenizer(tmp_path).kind == "word"


def test_class_weights_and_a_weight_dtype_are_kept(tmp_path):
    model = task_model("classification", class_weights={"yes": 4}).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = TaskModel.from_pretrained(tmp_path)
    assert again.class_weights.tolist() == [1, 4]
    assert again.score.weight.dtype == again.gpt.wte.weight.dtype == torch.bfloat16
    assert TaskModel.from_pretrained(tmp_path, dtype=torch.float32).score.weight.dtype == torch.float32


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    first = task_model("classification")
    first.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(export, "write_tensors", full)
    with pytest.raises(OSError, match="what was there is intact"):
        task_model("choice").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"problem_type": "multi_label_classification"},
            "problem_type is multi_label_classification, which gptfast does not",
        ),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label has the keys 0, 2; expected 0, 1"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "its head has the tensors"),
        (
            {"id2label": {"0": "a", "1": "a"}},
            "labels is ['a', 'a']; expected at least two classes with different names",
        ),
        ({task_files.SETTINGS: {"task": "x"}}, "gptfast_task.task is 'x'; expected one of"),
        ({task_files.SETTINGS: {"task": "choice"}}, "gptfast_task.special_tokens is missing"),
    ],
)
def test_damaged_settings(tmp_path, change, text):
    hf_model("GPT2ForSequenceClassification").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        TaskModel.from_pretrained(tmp_path)
    assert text in str(error.value) and str(tmp_path) in str(error.value)


def test_a_head_that_is_not_finite_is_refused(tmp_path):
    model = hf_model("GPT2ForSequenceClassification")
    torch.nn.init.constant_(model.score.weight, torch.inf)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight holds nan or infinities"):
        TaskModel.from_pretrained(tmp_path)


def test_another_summary_is_refused(tmp_path):
    hf_model("GPT2DoubleHeadsModel", summary_activation="tanh").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="summary_activation is 'tanh'; gptfast computes None"):
        TaskModel.from_pretrained(tmp_path)
