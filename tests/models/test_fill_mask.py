"""fill_mask and `gptfast fill-mask` against the fill-mask pipeline of transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast.models import BERT, GPT, GPTConfig
from gptfast.tokenizer import WordPieceTokenizer, get_tokenizer
from tests.support.train_command import gptfast

transformers = pytest.importorskip("transformers")

TEXT = "the quick brown foxes jumped over the lazy dogs, they were good and bad films\n" * 10
V = 100  # all words are tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = BERT(GPTConfig.preset("bert-base", n_layer=2, n_head=2, n_embd=32, vocab_size=V, block_size=24))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1) * 0.3)
    model.save_pretrained(place)
    WordPieceTokenizer.train(TEXT, V).save(place)
    return place


def pipeline(folder: Path) -> Any:
    model = transformers.BertForMaskedLM.from_pretrained(folder)
    return transformers.pipeline("fill-mask", model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder))


def check(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            check(a, b)
        return
    assert found.keys() == wanted.keys()
    assert found["score"] == pytest.approx(wanted["score"], rel=1e-4)
    assert {**found, "score": 0} == {**wanted, "score": 0}


def test_answers_are_those_of_the_pipeline(folder: Path):
    model, theirs = BERT.from_pretrained(folder), pipeline(folder)
    one, two = "The quick [MASK] jumped, over dogs!", "[MASK] foxes were [MASK]"
    check(model.fill_mask(one), theirs(one))
    check(model.fill_mask(two, top_k=3), theirs(two, top_k=3))
    check(model.fill_mask([one, two, "a [MASK]"]), theirs([one, two, "a [MASK]"]))  # rows of other lengths: padding
    check(model.fill_mask([one]), theirs([one]))
    check(model.fill_mask(one, targets=["dogs", "good", "the"]), theirs(one, targets=["dogs", "good", "the"]))
    check(model.fill_mask(one, top_k=1000), theirs(one, top_k=V))
    assert not model.training and model.train().fill_mask(one) and model.training


def test_rows_of_the_model_without_a_token_are_no_answers(folder: Path):
    model = BERT(BERT.from_pretrained(folder).config.replace(vocab_size=V + 28)).eval()
    answers = model.fill_mask("the [MASK]", top_k=200, tokenizer=WordPieceTokenizer.load(folder))
    assert sorted(answer["token"] for answer in answers) == list(range(V))


def test_the_command(folder: Path, capsys, monkeypatch):
    assert gptfast("fill-mask", "--model", folder, "--text", "the [MASK] dogs", "--top-k", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    check(found, pipeline(folder)("the [MASK] dogs", top_k=3))
    assert (
        gptfast("fill-mask", "--model", folder, "--text", "the [MASK] [MASK]", "--text", "a [MASK]", "--target", "dogs")
        == 0
    )
    shown = capsys.readouterr().out
    assert "(mask 2)" in shown and shown.count("dogs") >= 3
    monkeypatch.setattr("sys.stdin", io.StringIO("the [MASK]\n\na [MASK]\n"))
    assert gptfast("fill-mask", "--model", folder, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_what_is_refused(folder: Path, tmp_path: Path, capsys):
    model = BERT.from_pretrained(folder)
    cases = [
        (lambda: model.fill_mask("the dogs"), ValueError, r"there is no \[MASK\] in 'the dogs'"),
        (lambda: model.fill_mask("the [MASK]" * 20), ValueError, "block_size is 24"),
        (lambda: model.fill_mask([]), ValueError, "there are no texts"),
        (lambda: model.fill_mask(["a [MASK]", 3]), TypeError, "a text is a int"),
        (lambda: model.fill_mask("a [MASK]", top_k=0), ValueError, "top_k is 0"),
        (lambda: model.fill_mask("a [MASK]", targets="dogsfoxes"), ValueError, "'dogsfoxes' is not one token"),
        (lambda: model.fill_mask("a [MASK]", targets=[]), ValueError, "targets is empty"),
        (lambda: model.fill_mask("a [MASK]", tokenizer=get_tokenizer("char", TEXT)), ValueError, "'char' and has no"),
        (lambda: BERT(model.config).fill_mask("a [MASK]"), ValueError, "pass tokenizer="),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    bare = BERT(model.config.replace(head_transform=False))
    with pytest.raises(ValueError, match="no head for masks"):
        bare.fill_mask("a [MASK]", tokenizer=WordPieceTokenizer.load(folder))
    assert gptfast("fill-mask", "--model", folder, "--text", "the dogs") == 1
    assert "there is no [MASK]" in capsys.readouterr().err
    assert gptfast("generate", "--model", folder, "--prompt", "the") == 1
    assert "use gptfast.BERT" in capsys.readouterr().err
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=8)).save_pretrained(tmp_path / "gpt")
    assert gptfast("fill-mask", "--model", tmp_path / "gpt", "--text", "the [MASK]") == 1
    assert "gpt is a GPT, which continues texts (gptfast generate); expected a BERT" in capsys.readouterr().err
