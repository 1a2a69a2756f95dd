"""The README is the contract: its table, its Python, its tree."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from gptfast import ops
from gptfast.backend import PRODUCTS, has_kernel
from gptfast.generation import arguments
from gptfast.nn import inputs
from gptfast.testing import DTYPES, cases
from tests.ops.test_every_op import HELPERS
from tests.support import ROOT, emulated

README = ROOT / "README.md"
TEXT = README.read_text()


def test_support_matrix():
    """Every cell of the table is what a call does."""
    lines = [line.strip("| ") for line in TEXT.splitlines() if line.startswith("| ")]
    table = [re.split(r"\s*\|\s*", line) for line in lines]
    start = next(n for n, cells in enumerate(table) if cells[:2] == ["op", "cpu fp32"])
    header, rows = table[start], []
    for row in table[start + 1 :]:
        if len(row) != len(header):
            break
        rows.append(row)
    assert {row[0] for row in rows} == set(ops.__all__) - HELPERS
    dtypes = {**DTYPES, "fp64": torch.float64}
    for row in rows:
        case = cases(row[0])[0]
        for name, cell in zip(header[1:], row[1:], strict=True):
            backend, _, dtype = name.partition(" ")
            if backend == "cuda":
                assert cell == ("yes" if emulated.has_kernel(row[0]) else "no"), row[0]
                continue
            if backend == "triton":  # tests/triton/test_triton.py runs what is registered
                assert cell == ("yes" if has_kernel(row[0], "triton") and row[0] not in PRODUCTS else "no"), row[0]
                continue
            args = case.inputs(dtypes.get(dtype, torch.float32))
            works = "yes"
            try:
                getattr(ops, row[0])(*args, **case.options, backend=backend)
            except RuntimeError as error:
                works = "no" if "was asked for" in str(error) else str(error)
            assert works == cell, (row[0], name)


def test_the_python_runs(tmp_path, capsys, monkeypatch):
    """All blocks, one after another; the loss is what transformers computes from the same weights and text."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for n, code in enumerate(blocks):
        exec(compile(code, f"README.md, block {n}", "exec"), namespace)
    model, tokens = namespace["model"].eval(), namespace["tokens"]
    assert capsys.readouterr().out.startswith("To be, or not to be")
    assert namespace["logits"] is None
    assert namespace["out"].shape == (2, 8, 1024, 64)
    assert not torch.equal(namespace["out"], namespace["again"])
    head = namespace["head_and_loss"].linear.weight
    assert namespace["head_loss"].item() == pytest.approx(math.log(len(head)), rel=0.1)
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()(tokens, labels=tokens).loss
    assert model(tokens[:, :-1], tokens[:, 1:])[1].item() == pytest.approx(theirs.item(), abs=1e-4)


def test_the_page_for_newcomers_runs(tmp_path, monkeypatch):
    """docs/coming-from.md, block by block, with a tiny model of transformers and a tokenizer of words."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: n for n, word in enumerate(["[PAD]", "[END]", *"abcdefgh"])}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="[PAD]", eos_token="[END]")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(words)}
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, pad_token_id=0, eos_token_id=1)).eval()
    monkeypatch.chdir(tmp_path)
    page = (README.parent / "docs/coming-from.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {"hf": hf, "tok": tok}
    for n, code in enumerate(blocks):
        exec(compile(code, f"coming-from.md, block {n}", "exec"), namespace)
    assert transformers.GPT2LMHeadModel.from_pretrained("back").config.vocab_size == len(words)
    names = set(re.findall(r"^\| `(\w+)`(?:, `\w+`)* \| ", page, re.M))
    refused = {name for name in names if name in arguments.REFUSED or name in inputs.REFUSED}
    assert refused >= {"token_type_ids", "past_key_values", "bad_words_ids", "sequence_bias", "min_new_tokens"}


def test_the_tree_exists():
    [tree] = re.findall(r"## The tree\n(.*?)\n## ", TEXT, re.S) or re.findall(r"## The tree\n(.*?)\nHow to", TEXT, re.S)
    paths = [p for row in re.findall(r"^\| (`.*?) \|", tree, re.M) for p in re.findall(r"`([^`]+)`", row)]
    assert len(paths) > 15
    for path in paths:
        pattern = path.replace("<op>", "gelu")
        assert list(README.parent.glob(pattern)) or list(README.parent.glob(f"**/{pattern}")), path


def test_the_commands_exist():
    from gptfast.cli import app

    known = {command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    assert {m for m in re.findall(r"^gptfast ([a-z-]+)", TEXT, re.M)} <= known
    targets = re.findall(r"^([a-z-]+):.*##", (README.parent / "Makefile").read_text(), re.M)
    assert {m for m in re.findall(r"(?:^ *|`)make ([a-z-]+)", TEXT, re.M)} <= set(targets)


@pytest.mark.parametrize("word", ["<!--", "TODO"])
def test_nothing_is_left_open(word):
    assert word not in TEXT
