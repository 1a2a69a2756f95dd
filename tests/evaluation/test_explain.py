"""The inside of a GPT beside transformers, the worked examples by their printed numbers, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptfast
from gptfast.cli import main
from gptfast.evaluation.inside import analogy, distribution, look_inside, nearest
from gptfast.evaluation.worked_example import attention_example, bpe_example
from gptfast.generation.beam_tree import beam_tree
from gptfast.tokenizer import get_tokenizer

TEXT = "abcdefghijklmnopqrstuvwxyz ,$\n"
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def small(**options: Any) -> gptfast.GPT:
    torch.manual_seed(2)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": len(set(TEXT)), "dropout": 0.1}
    gpt = gptfast.GPT(gptfast.GPTConfig(**{**shape, **options})).eval()
    for parameter in gpt.parameters():
        parameter.data *= 4
    return gpt


@pytest.mark.parametrize("ids", [IDS, [7], list(range(24))])
def test_weights_and_lens_are_those_of_transformers(tmp_path: Path, ids: list[int]):
    from transformers import GPT2LMHeadModel

    model = small()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        states = [theirs.transformer.ln_f(state) for state in out.hidden_states[:-1]] + [out.hidden_states[-1]]
        lens = [theirs.lm_head(state)[0].log_softmax(-1) for state in states]
    found = look_inside(model.train(), ids)
    assert model.training and found.attention.shape == (3, 2, len(ids), len(ids))
    np.testing.assert_allclose(found.attention, torch.cat(out.attentions).numpy(), atol=2e-6)
    assert found.lens_ids.tolist() == [logprobs.argmax(-1).tolist() for logprobs in lens]
    np.testing.assert_allclose(found.lens_logprobs, [x.max(-1).values.numpy() for x in lens], atol=2e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bert_looks_both_ways(tmp_path: Path):
    from transformers import BertModel

    torch.manual_seed(2)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 30, "dropout": 0.1}
    model = gptfast.BERT(gptfast.GPTConfig.preset("bert-base", **shape))
    for parameter in model.parameters():
        parameter.data *= 4
    model.save_pretrained(tmp_path)
    theirs = BertModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = torch.cat(theirs(torch.tensor([IDS]), output_attentions=True).attentions)
        logits = model.eval()(torch.tensor([IDS]))[0]
    found = look_inside(model, IDS)
    np.testing.assert_allclose(found.attention, wanted.numpy(), atol=2e-6)
    assert found.attention[0, :, 0, -1].min() > 0, "the first token sees the last"
    assert found.lens_ids[-1].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "options", [{"attention_pattern": "alternating", "window": 3}, {"norm_position": "post", "final_norm": False}]
)
def test_other_shapes(options: dict[str, Any]):
    model = small(**options)
    found = look_inside(model, IDS)
    np.testing.assert_allclose(found.attention.sum(-1), 1, atol=1e-6)
    with torch.no_grad():
        logprobs = model(torch.tensor([IDS]))[0].log_softmax(-1)
    assert found.lens_ids[-1].tolist() == logprobs.argmax(-1).tolist()
    if "window" in options:
        assert found.attention[1, 0, 9, :7].tolist() == [0] * 7 and found.attention[0, 0, 9, 0] > 0


def test_neighbours_and_analogies():
    model = small()
    w = model.wte.weight.detach()
    w[5] = 2 * w[4]
    w[8] = w[1] - w[2] + w[3]
    assert {token for token, _ in nearest(model, w[4], 2)} == {4, 5}
    assert nearest(model, w[4], 1, exclude=[4])[0] == (5, pytest.approx(1.0))
    assert analogy(model, 1, 2, 3, 1)[0] == (8, pytest.approx(1.0))
    with pytest.raises(ValueError, match="nearest: k is 0"):
        nearest(model, w[0], 0)


def test_distribution_is_what_sampling_draws_from():
    logits = torch.randn(12) * 2
    found = distribution(logits, temperature=0.7, top_k=6, top_p=0.9)
    drawn = gptfast.ops.sample(logits.expand(40_000, 12), temperature=0.7, top_k=6, top_p=0.9, seed=1)
    shares = torch.bincount(drawn, minlength=12) / len(drawn)
    assert (shares - found).abs().max() < 0.01 and ((shares == 0) == (found == 0)).all()
    with pytest.raises(ValueError, match="distribution: temperature 0"):
        distribution(logits, temperature=0.0)


def test_beam_tree_ends_where_generate_does():
    model = small()
    tree = beam_tree(model, IDS, beams=3, steps=4)
    assert [sum(node.depth == d for node in tree) for d in range(1, 5)] == [3, 9, 9, 9]
    best = max((node for node in tree if node.depth == 4), key=lambda node: node.logprob)
    path, node = [], best
    while node.parent >= 0:
        path, node = [node.token, *path], tree[node.parent]
    row = model.generate([IDS], max_new_tokens=4, num_beams=3, eos_token_id=None)[0]
    assert row[len(IDS) :] == [node.token, *path]
    assert sum(node.kept for node in tree if node.depth == 4) == 3
    with pytest.raises(ValueError, match="beam_tree: steps is 15; expected at most 14"):
        beam_tree(model, IDS, steps=15)


def test_worked_attention():
    """The numbers of the printed example; its fourth row of weights is wrong there."""
    found = attention_example()
    printed = [[0.675], [0.475, 0.845], [0.535, 0.670, 1.045], [0.520, 0.715, 0.835, 0.950]]
    for row, numbers in zip(found["masked"], printed, strict=True):
        assert row[: len(numbers)] == pytest.approx(numbers, abs=5.1e-4) and row[len(numbers) :] == [None] * (
            4 - len(numbers)
        )
    for row, numbers in zip(found["weights"], [[1], [0.41, 0.59], [0.26, 0.30, 0.44]], strict=False):
        assert row[: len(numbers)] == pytest.approx(numbers, abs=5e-3)
    assert found["weights"][3] == pytest.approx([0.1952, 0.2372, 0.2675, 0.3001], abs=1e-4)
    assert found["output"][1] == pytest.approx([0.53, 0.80, 0.54, 0.28], abs=5e-3)
    assert set(found["backends"]) >= {"eager"} and "0.97" in found["notes"][1]
    for rows in found["backends"].values():
        np.testing.assert_allclose(rows, found["output"], atol=3e-7)


def test_worked_bpe():
    found = bpe_example()
    assert found["words"] == {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    steps = found["steps"]
    assert [(step["token"], step["count"]) for step in steps[:3]] == [("ug", 20), ("un", 16), ("hug", 15)]
    assert steps[2]["corpus"] == [
        [["hug"], 10],
        [["p", "ug"], 5],
        [["p", "un"], 12],
        [["b", "un"], 4],
        [["hug", "s"], 5],
    ]
    assert steps[2]["vocabulary"] == ["b", "g", "h", "n", "p", "s", "u", "ug", "un", "hug"]
    assert all(len(pieces) == 1 for pieces, _ in steps[-1]["corpus"])


def run(capsys: Any, monkeypatch: Any, *arguments: Any) -> str:
    monkeypatch.setattr("sys.argv", ["gptfast", "explain", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out if end.value.code == 0 else err


def test_command(tmp_path: Path, capsys: Any, monkeypatch: Any):
    model, tokenizer = small(), get_tokenizer("char", TEXT)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    given = ["--model", tmp_path / "m", "--prompt", "to be, $o$", "--out", tmp_path / "out", "--analogy", "a,b,c"]
    found = json.loads(run(capsys, monkeypatch, *given, "--json"))
    assert found["ids"] == tokenizer.encode("to be, $o$") and "".join(found["tokens"]) == "to be, $o$"
    assert (
        np.array(found["attention"]["weights"]).shape == (3, 2, 10, 10) == np.load(tmp_path / "out/attention.npy").shape
    )
    assert len(found["logit_lens"]) == 4 and set(found["logit_lens"][0]) >= {"id", "logprob"}
    assert found["parameters"]["total"] == model.num_parameters() and len(found["analogy"]) == 5
    assert found["next"][0]["id"] == found["logit_lens"][-1]["id"]
    names = {"attention_00", "attention_01", "attention_02", "mask", "logit_lens", "next_token", "beams", "positions"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == names
    page = run(capsys, monkeypatch, *given)
    assert "logit lens" in page and f"{model.num_parameters():,}" in page
    example = json.loads(run(capsys, monkeypatch, "--worked-example", "--json", "--out", tmp_path / "worked"))
    assert example["attention"]["masked"][0][1] is None and example["bpe"]["steps"][0]["token"] == "ug"
    assert "u + g" in run(capsys, monkeypatch, "--worked-example")


def test_a_prompt_that_fills_the_context(tmp_path: Path, capsys: Any, monkeypatch: Any):
    """Nothing is left for the beam tree, or less than its steps: the rest is still shown."""
    small().save_pretrained(tmp_path / "M")
    get_tokenizer("char", TEXT).save(tmp_path / "M")
    for length, depth in ((24, 0), (22, 2), (10, 4)):
        given = ["--model", tmp_path / "M", "--prompt", "a" * length, "--json", "--out", tmp_path / f"{length}"]
        found = json.loads(run(capsys, monkeypatch, *given))
        assert max((node["depth"] for node in found["beams"]), default=0) == depth and len(found["next"]) == 10
        assert (tmp_path / f"{length}" / "beams.png").exists() == (depth > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model and --prompt, or --worked-example"),
        (["--worked-example", "--prompt", "x"], "--worked-example needs no --model"),
        (["--model", "M", "--prompt", "a" * 25], "25"),
        (["--model", "M", "--prompt", "abc", "--analogy", "ab,c,d"], "--analogy is 'ab,c,d'"),
        (["--model", "M", "--prompt", "abc", "--beams", "0"], "beams is 0"),
        (["--model", "M", "--prompt", "abc", "--beams", "10000"], "beams is 10000; expected at most"),
        (["--model", "M", "--prompt", "abc", "--temperature", "0"], "temperature 0"),
    ],
)
def test_errors_of_the_command(tmp_path: Path, capsys: Any, monkeypatch: Any, arguments: list[str], message: str):
    small().save_pretrained(tmp_path / "M")
    get_tokenizer("char", TEXT).save(tmp_path / "M")
    text = run(capsys, monkeypatch, *(tmp_path / "M" if a == "M" else a for a in arguments))
    assert text.startswith("error: ") and message in text


def test_a_compiled_model_has_no_inside():
    with pytest.raises(TypeError, match="look_inside: model is a CompiledGPT; expected a GPT"):
        look_inside(small().compile_for_inference("int8"), IDS)
