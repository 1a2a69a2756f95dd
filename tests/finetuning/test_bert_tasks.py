"""Tasks of a BERT against transformers' BertForSequenceClassification, and fine-tuning from a pre-trained one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptfast.finetuning import TaskModel
from gptfast.finetuning.launch import new_run, resumed_run
from gptfast.models import BERT, GPTConfig
from gptfast.tokenizer import WordPieceTokenizer

transformers = pytest.importorskip("transformers")

TEXT = "the quick brown foxes jumped over the lazy dogs, they were good and bad films\n" * 10


def theirs_of(labels: int, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 80,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = transformers.BertConfig(**sizes, max_position_embeddings=32, num_labels=labels)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.3) + (p.dim() == 1) * 0.8)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("labels", [3, 2])
def test_logits_and_files_both_ways(labels: int, tmp_path: Path):
    theirs = theirs_of(labels, tmp_path / "theirs")
    tokenizer = WordPieceTokenizer.train(TEXT, 80)
    tokenizer.save(tmp_path / "theirs")
    ours = TaskModel.from_pretrained(tmp_path / "theirs")
    assert ours.task == "classification" and len(ours.labels) == labels
    texts = ["The quick foxes", "they were good and bad films, lazy dogs"]
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = theirs(**batch).logits
        found = ours(**ours.batch(texts, labels=False)).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)  # measured: 1e-6
        types = torch.randint(2, batch["input_ids"].shape)
        given = {"attention_mask": batch["attention_mask"], "token_type_ids": types}
        wanted_types = theirs(batch["input_ids"], **given).logits
        torch.testing.assert_close(ours(batch["input_ids"], **given).logits, wanted_types, rtol=1e-5, atol=2e-5)
    ours.save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(again).__name__ == "BertForSequenceClassification" and not any(report.values()), report
    torch.testing.assert_close(again.eval()(**batch).logits, wanted, rtol=1e-5, atol=2e-5)
    one, two = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert one.keys() == two.keys()
    with pytest.raises(ValueError, match="is a checkpoint of a task"):
        BERT.from_pretrained(tmp_path / "theirs")


def test_two_texts_get_both_token_types(tmp_path: Path):
    tokenizer = WordPieceTokenizer.train(TEXT, 80)
    torch.manual_seed(0)
    bert = BERT(GPTConfig.preset("bert-base", n_layer=1, n_head=2, n_embd=16, vocab_size=80, block_size=32))
    model = TaskModel(bert, "entailment", tokenizer=tokenizer).eval()
    assert bert.lm_transform is None and bert.next_sentence is None
    pairs = [("the foxes", "the dogs were lazy"), ("they were good", "bad films")]
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    told = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        *zip(*pairs, strict=True), padding=True, return_tensors="pt"
    )
    batch = model.batch(pairs, labels=False)
    assert batch["ids"].tolist() == told["input_ids"].tolist() and told["token_type_ids"].any()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, theirs(**told).logits, rtol=1e-5, atol=2e-5)


def test_refusals():
    bert = BERT(GPTConfig.preset("bert-base", n_layer=1, n_head=2, n_embd=16, vocab_size=80, block_size=32))
    with pytest.raises(ValueError, match="'choice', which a BERT has no head for"):
        TaskModel(bert, "choice")
    model = TaskModel(bert, "classification", ["a", "b"], WordPieceTokenizer.train(TEXT, 80))
    with pytest.raises(ValueError, match="lm_coef is given for a BERT"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), lm_coef=0.5)


def test_fine_tuning_learns_and_resumes_to_the_same_bits(tmp_path: Path):
    """From a checkpoint of pre-training without a pooler: foxes against dogs, by the first token. The rate is constant, as it would
    else depend on `max_steps`."""
    tokenizer = WordPieceTokenizer.train(TEXT, 80)
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 80, "block_size": 32}
    BERT(GPTConfig.preset("bert-base", **shape, pooler=False, next_sentence_head=False)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save(tmp_path / "base")
    rows = [{"text": f"the {'lazy ' * (n % 3)}{word}", "label": word} for n in range(12) for word in ("foxes", "dogs")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        **{"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"), "task": "classification"},
        **{"method": "full", "batch_size": 4, "learning_rate": 3e-3, "dtype": "float32", "eval_every": 8},
        **{"warmup_steps": 2, "min_lr": 3e-3},
    }
    new_run({**options, "out": tmp_path / "two", "max_steps": 16}, progress=False).loop.train()
    new_run({**options, "out": tmp_path / "one", "max_steps": 24}, progress=False).loop.train()
    resumed_run({"out": tmp_path / "two", "max_steps": 24}, progress=False).loop.train()
    one, two = (load_file(tmp_path / name / "last/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    model = TaskModel.from_pretrained(tmp_path / "two/best")
    assert [p.label for p in model.predict(["the lazy foxes", "the dogs"])] == ["foxes", "dogs"]
    with pytest.raises(ValueError, match="is a BERT, which classification"):
        new_run({**options, "method": "lora", "out": tmp_path / "lora"}, progress=False)
    with pytest.raises(ValueError, match=r"`lm_coef` is 0\.5, but a BERT"):
        new_run({**options, "lm_coef": 0.5, "out": tmp_path / "coef"}, progress=False)
