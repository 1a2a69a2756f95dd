"""Perplexity beside transformers and beside one token at a time, counts of text, comparisons, the command."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

import gptfast
from gptfast.cli import main
from gptfast.data import Document
from gptfast.evaluation import Settings, compare, perplexity, score_documents
from gptfast.evaluation.counts import count_text, count_token
from gptfast.evaluation.detokenizers import by_lines, wikitext
from gptfast.evaluation.perplexity import BLOCK
from gptfast.finetuning import LoraConfig, PromptTuningConfig
from gptfast.tokenizer import get_tokenizer, lenient, load_tokenizer
from gptfast.tokenizer.pieces import blocks_of
from tests.support.texts import byte_level

KEYS = {"perplexity", "word_perplexity", "char_perplexity", "byte_perplexity", "bits_per_byte", "tokens", "words"}
KEYS |= {"characters", "bytes", "documents", "context", "stride", "bos", "join", "detokenize"}
TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer — naïve café, 東京!\n" * 4


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return get_tokenizer("gpt2")


@pytest.fixture(scope="module")
def model() -> gptfast.GPT:
    torch.manual_seed(1)
    gpt = gptfast.GPT(gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=50257, dropout=0.1))
    for parameter in gpt.parameters():
        parameter.data *= 3  # far from uniform
    return gpt.eval()


def one_at_a_time(model: Any, ids: list[int], context: int, stride: int) -> tuple[float, int]:
    """The windows of transformers' documentation, each target by a softmax of its own in float64."""
    loss, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        for t in range(max(before, begin + 1), end):
            with torch.no_grad():
                logits = model(torch.tensor([ids[begin:t]]))[0, -1].double()
            loss -= float(logits.log_softmax(-1)[ids[t]])
            count += 1
        before = end
        if end == len(ids):
            break
    return loss, count


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 16), (20, 7), (32, 1), (5, 5), (2, 1)])
@pytest.mark.parametrize("bos", [False, True])
def test_sum_is_that_of_one_token_at_a_time(model: Any, tokenizer: Any, context: int, stride: int, bos: bool):
    text = TEXT[:180]
    ids = ([50256] if bos else []) + tokenizer.encode(text)
    loss, count = one_at_a_time(model, ids, context, stride)
    found = perplexity(model, text, tokenizer, context=context, stride=stride, bos=bos)
    assert set(found) == KEYS and found["tokens"] == count
    assert math.log(found["perplexity"]) == pytest.approx(loss / count, abs=1e-5)
    if bos:
        scored = text if stride < context else None
    else:
        scored = text[len(tokenizer.decode(ids[:1])) :] if stride < context else None
    if scored is not None:
        assert (found["bytes"], found["characters"]) == (len(scored.encode()), len(scored))
        assert found["words"] == len(scored.split())
        assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / len(scored.encode()), rel=1e-5)


def test_equal_windows_of_the_library(model: Any, tokenizer: Any, tmp_path: Path):
    """transformers' own loss of each window, weighed by its number of targets."""
    from transformers import GPT2LMHeadModel

    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = tokenizer.encode(TEXT)
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), 12):
        end = min(begin + 32, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : before - begin] = -100
        with torch.no_grad():
            loss = theirs(torch.tensor([ids[begin:end]]), labels=labels).loss
        targets = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * targets, count + targets, end
        if end == len(ids):
            break
    found = perplexity(model, TEXT, tokenizer, stride=12)
    assert found["tokens"] == count and math.log(found["perplexity"]) == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("stride", [32, 10])
def test_the_engine_agrees(model: Any, tokenizer: Any, stride: int):
    mine, engine = (perplexity(m, TEXT, tokenizer, stride=stride) for m in (model, model.compile_for_inference("fp32")))
    assert engine["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-5)
    assert {k: v for k, v in mine.items() if "per" not in k} == {k: v for k, v in engine.items() if "per" not in k}


def test_documents_do_not_see_each_other(model: Any, tokenizer: Any):
    parts = [TEXT[:90], TEXT[90:120], "x", TEXT[120:]]
    scores = score_documents(model, [Document(str(n), part) for n, part in enumerate(parts)], tokenizer)
    alone = [score_documents(model, [Document("", part)], tokenizer)[0] for part in parts]
    for one, other in zip(scores, alone, strict=True):
        assert (one.tokens, one.counts) == (other.tokens, other.counts) and one.loss == pytest.approx(
            other.loss, rel=1e-6
        )
    assert scores[2].tokens == scores[2].counts.bytes == 0  # its only token has nothing before it


def test_a_stream_of_documents(model: Any, tokenizer: Any):
    parts = [TEXT[:90], TEXT[90:200]]
    ids = [*tokenizer.encode(parts[0]), tokenizer.eos_id, *tokenizer.encode(parts[1])]
    loss, count = one_at_a_time(model, ids, 32, 32)
    found = perplexity(model, parts, tokenizer, join=True, stride=32)
    assert found["tokens"] == count and math.log(found["perplexity"]) == pytest.approx(loss / count, abs=1e-5)
    unscored = [ids[n] for n in range(0, len(ids), 32) if ids[n] != tokenizer.eos_id]
    assert found["bytes"] == len("".join(parts).encode()) - len(tokenizer.decode_bytes(unscored))


def test_a_stream_by_a_tokenizer_that_ends_its_texts_itself(model: Any, tokenizer: Any, tmp_path: Path):
    tokenizer.save(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "add_eos_token": True}))
    parts, ends = [TEXT[:90], TEXT[90:200]], load_tokenizer(tmp_path)
    assert ends.encode("x")[-1] == tokenizer.eos_id
    wanted, found = (perplexity(model, parts, kind, join=True, stride=32) for kind in (tokenizer, ends))
    assert found["tokens"] == wanted["tokens"] + 1, "the end of the last one is scored too"


def test_dropout_is_off_and_comes_back(model: Any, tokenizer: Any):
    model.train()
    try:
        assert perplexity(model, TEXT, tokenizer) == perplexity(model, TEXT, tokenizer) and model.training
    finally:
        model.eval()


def test_counts(tokenizer: Any):
    for size in (1, 2, 3, 7, 1000):
        counts = count_text(TEXT[n : n + size] for n in range(0, len(TEXT), size))
        assert (counts.bytes, counts.characters, counts.words) == (len(TEXT.encode()), len(TEXT), len(TEXT.split()))
    ids = tokenizer.encode(TEXT)
    every = [count_token(tokenizer, token, None, None) for token in ids]
    total = count_text([TEXT])
    for name in ("bytes", "characters"):
        assert sum(getattr(count, name) for count in every) == getattr(total, name), name


def test_words_of_what_is_scored():
    """A word counts if a token of it is scored: every word of a text with one token a character, but those of a single letter."""
    text = "A bc d  efg\nh ij k lmn o\tp qr s"
    chars = get_tokenizer("char", text)
    gpt = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=chars.vocab_size))
    for context in range(2, 9):
        for stride in range(1, context + 1):
            unscored = range(0, len(text), context) if stride == context else [0]
            words, inside = 0, False
            for n, c in enumerate(text):
                counts = not c.isspace() and n not in unscored
                words, inside = words + (counts and not inside), not c.isspace() and (inside or counts)
            found = perplexity(gpt, text, chars, context=context, stride=stride)
            assert (found["words"], found["bytes"]) == (words, len(text) - len(unscored)), (context, stride)
    assert perplexity(gpt, text, chars, bos=False)["words"] == len(text.split()) - 1  # all of A
    assert perplexity(gpt, text[2:], chars)["words"] == len(text[2:].split())  # c of bc


@pytest.mark.parametrize("size", [1, 3, 50, 1 << 15])
def test_pieces_change_nothing(model: Any, tokenizer: Any, monkeypatch: Any, size: int):
    """Texts in small pieces: the same sums, counts and windows, joined, detokenised and with a first token too."""
    texts = [TEXT + ' = A = \n 1 @,@ 024 " b " \n' + TEXT, "x", TEXT[:70], " "]
    options = [{}, {"stride": 32, "bos": True}, {"join": True, "stride": 7}, {"detokenize": "wikitext", "context": 20}]
    expected = [perplexity(model, texts, tokenizer, **some) for some in options]
    monkeypatch.setattr(sys.modules["gptfast.evaluation.perplexity"], "BLOCK", size)
    for some, whole in zip(options, expected, strict=True):
        found = perplexity(model, iter(texts), tokenizer, **some)
        numbers = {key: value for key, value in found.items() if isinstance(value, float)}
        assert numbers == pytest.approx({key: whole[key] for key in numbers}, rel=1e-6) and found.keys() == whole.keys()
        assert all(found[key] == whole[key] for key in found.keys() - numbers.keys())


def test_memory_does_not_grow_with_a_text(tmp_path: Path, monkeypatch: Any):
    """Ten times the text, and the same peak of what Python and numpy hold, beside a model that predicts for nothing."""
    letters = "To be, or not to be: that is the question.\n"
    chars = get_tokenizer("char", letters)
    gpt = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=512, vocab_size=chars.vocab_size))
    scorer = lambda model, context: lambda rows: [np.zeros(len(ids) - first) for ids, first in rows]  # noqa: E731
    monkeypatch.setattr(sys.modules["gptfast.evaluation.perplexity"], "scorer", scorer)
    peaks = []
    for count in (6_000, 60_000):  # 0.26 and 2.6 MB
        (tmp_path / "text.txt").write_text(letters * count)
        tracemalloc.start()
        (score,) = score_documents(gpt, [Document("text", tmp_path / "text.txt")], chars, Settings(stride=512))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert score.tokens == score.counts.bytes == len(letters) * count - math.ceil(len(letters) * count / 512)
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_a_tokenizer_that_needs_whole_texts(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any):
    """Its ids would be others in pieces; the command's lenient wrapper hid that it is one."""
    rust = byte_level(tokenizer.vocab, tokenizer.merges)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rust.save(str(tmp_path / "tokenizer.json"))
    prefixed = load_tokenizer(tmp_path)
    text = "One line.\nTwo lines." * 2000
    scorer = lambda model, context: lambda rows: [-ids[first:].astype(float) for ids, first in rows]  # noqa: E731
    monkeypatch.setattr(sys.modules["gptfast.evaluation.perplexity"], "scorer", scorer)
    assert prefixed.whole_texts and len(text) > BLOCK
    scores = [
        score_documents(model, [Document("", text)], one, Settings(stride=32)) for one in (prefixed, lenient(prefixed))
    ]
    assert scores[0] == scores[1]
    assert scores[0][0].loss == sum(i for n, i in enumerate(prefixed.encode(text)) if n % 32)


def test_paired_differences(model: Any, tokenizer: Any):
    documents = [Document(str(n), TEXT[n * 40 : n * 40 + 80]) for n in range(5)]
    a, b = (score_documents(m, documents, tokenizer) for m in (model, model.compile_for_inference("int4")))
    expected = torch.tensor(
        [y.loss / y.tokens - x.loss / x.tokens for x, y in zip(a, b, strict=True)], dtype=torch.float64
    )
    found = compare(a, b)
    assert found["difference"] == pytest.approx(float(expected.mean())) and found["documents"] == 5
    assert found["standard_error"] == pytest.approx(float(expected.std() / 5**0.5))
    assert compare(a[:1], b[:1])["standard_error"] is None


def test_wikitext():
    text = TEXT + ' = A = \n\n " b " ( c , d ) \n'
    for size in (1, 5, 1000):
        assert "".join(by_lines(wikitext, blocks_of(text, size))) == wikitext(text)
    given = ' = Valkyria Chronicles = \n It sold 1 @,@ 024 copies , " as expected " ( in Japan ) ; the team \'s long @-@ range plan .\n'
    assert (
        wikitext(given)
        == '= Valkyria Chronicles =\nIt sold 1,024 copies, "as expected" (in Japan); the team\'s long-range plan.\n'
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 33}, ValueError, "context is 33; expected at most 32"),
        ({"context": 1}, ValueError, "context is 1; expected at least 2"),
        ({"context": 8, "stride": 9}, ValueError, "stride is 9; expected at most 8"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"stride": 2.0}, TypeError, "stride is 2.0; expected an int"),
        ({"detokenize": "ptb"}, ValueError, "detokenize is 'ptb'; expected one of none, wikitext"),
        ({"texts": "a"}, ValueError, "no token to score; expected a text of at least two tokens"),
        ({"texts": []}, ValueError, "no token to score"),
    ],
)
def test_errors(model: Any, tokenizer: Any, options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=f"perplexity: {message}"):
        perplexity(model, tokenizer=tokenizer, **{"texts": TEXT, **options})


def test_errors_of_tokenizers(tokenizer: Any):
    small = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=70)).eval()
    with pytest.raises(ValueError, match="document 1 has token 18798, but the model's vocabulary has 70"):
        perplexity(small, "ello ello", tokenizer)
    chars = get_tokenizer("char", "ab\n")
    for option in ("bos", "join"):
        with pytest.raises(ValueError, match=f"perplexity: {option}=True, but"):
            perplexity(small, ["ab", "ba"], chars, **{option: True})


def run(capsys: Any, monkeypatch: Any, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["gptfast", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out if end.value.code == 0 else err


def test_command(model: Any, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    folder, text, rows = tmp_path / "model", tmp_path / "text.txt", tmp_path / "rows.jsonl"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    text.write_text(TEXT)
    rows.write_text("".join(json.dumps({"text": TEXT[n * 50 : n * 50 + 70]}) + "\n" for n in range(4)))
    found = json.loads(run(capsys, monkeypatch, "--model", folder, "--data", text, "--stride", "16", "--bos", "--json"))
    assert found == {"model": str(folder), "format": None} | perplexity(model, TEXT, tokenizer, stride=16, bos=True)
    table = run(capsys, monkeypatch, "--model", folder, "--data", text, "--quantize", "int8", "--no-bos")
    assert "context 32, stride 16" in table and "the first token of each not scored" in table
    names = ["--compare", folder, f"{folder}:int8", f"{folder}:q4"]
    found = json.loads(run(capsys, monkeypatch, *names, "--data", rows, "--json"))
    assert [row["documents"] for row in found["results"]] == [4, 4, 4]
    assert [row["format"] for row in found["comparisons"]] == ["int8", "q4"]
    assert all(row["standard_error"] > 0 for row in found["comparisons"])
    assert " nats a token over 4 documents" in run(capsys, monkeypatch, *names, "--data", rows)


@pytest.mark.parametrize("config", [LoraConfig(init_lora_weights=False), PromptTuningConfig(6, "RANDOM")])
def test_the_command_takes_an_adapter(
    config: Any, model: Any, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    """A soft prompt takes room in the windows."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    text.write_text(TEXT)
    adapted = gptfast.GPT.from_pretrained(folder)
    torch.manual_seed(1)
    adapted.add_adapter(config)
    adapted.save_adapter(tmp_path / "adapter")
    command = ["--model", folder, "--adapter", tmp_path / "adapter", "--data", text, "--json"]
    found = json.loads(run(capsys, monkeypatch, *command))
    assert found["adapter"] == str(tmp_path / "adapter")
    assert found["context"] == 32 - 6 * isinstance(config, PromptTuningConfig)
    assert found["perplexity"] == perplexity(adapted, TEXT, tokenizer)["perplexity"]
    assert abs(found["perplexity"] / perplexity(model, TEXT, tokenizer)["perplexity"] - 1) > 0.01
    packed = json.loads(run(capsys, monkeypatch, *command, "--quantize", "fp32"))
    assert packed["perplexity"] == pytest.approx(found["perplexity"], rel=1e-4)
    with pytest.raises(ValueError, match="the model's block_size, less a soft prompt"):
        perplexity(adapted, TEXT, tokenizer, context=33)


def test_numbers_that_json_does_not_have(model: Any, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    """One word of 1200 letters: its perplexity is infinite, which is no JSON."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("x7Qz" * 300)
    assert perplexity(model, "x7Qz" * 300, tokenizer)["word_perplexity"] == math.inf
    shown = run(capsys, monkeypatch, "--model", tmp_path / "model", "--data", tmp_path / "text.txt", "--json")
    assert json.loads(shown)["word_perplexity"] is None and "Infinity" not in shown


def test_models_with_different_tokens_are_said(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    chars = get_tokenizer("char", TEXT)
    small = gptfast.GPT(model.config.replace(vocab_size=chars.vocab_size))
    for name, gpt, cuts in (("a", model, tokenizer), ("b", small, chars)):
        gpt.save_pretrained(tmp_path / name)
        cuts.save(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    names = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setattr(
        "sys.argv", ["gptfast", "evaluate", "--compare", *map(str, names), "--data", str(tmp_path / "text.txt")]
    )
    with pytest.raises(SystemExit):
        main()
    assert "compare bits per byte" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x.txt"], "no --model; give"),
        (["--compare", "a", "--data", "x.txt"], "--compare takes at least two models"),
        (["--compare", "a", "b:int3", "--data", "x.txt"], "format 'int3' after its colon"),
        (["--model", "nowhere/at/all", "--data", "missing.txt"], "missing.txt"),
    ],
)
def test_errors_of_the_command(capsys: Any, monkeypatch: Any, arguments: list[str], message: str):
    text = run(capsys, monkeypatch, *arguments)
    assert text.startswith("error: ") and message in text
