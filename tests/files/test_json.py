"""JSON from elsewhere: every value is checked for its type; errors name file and key."""

from __future__ import annotations

import json

import pytest
import tokenizers

from gptfast import GPT, GPTConfig
from gptfast._json import NULL, expect, field, items, parse, read_json
from gptfast.checkpoints.weight_files import weight_files
from gptfast.models.stored import read_settings
from gptfast.tokenizer import BPETokenizer, load_tokenizer
from gptfast.training.checkpoint import check_source, read_checkpoint
from gptfast.training.config import TrainConfig
from gptfast.training.log import read_log


@pytest.mark.parametrize(
    ("kinds", "right", "wrong", "match"),
    [
        (int, [0, -3, 2**70], [True, 1.0, "1", None, []], "expected a whole number"),
        (float, [0, 1.5, 2**70], [False, "1"], "expected a number"),
        (bool, [True], [0, None], "expected true or false"),
        ((str, NULL), ["", None], [0, False, {}], "expected a text or null"),
        (dict, [{}], [[], None], "expected an object"),
        (list, [[]], [{}, "a"], "expected a list"),
    ],
)
def test_kinds(kinds, right, wrong, match):
    for value in right:
        assert expect(value, kinds, "k", "f.json") is value
        assert items([value], kinds, "k", "f.json") == [value] and field({"k": value}, "k", kinds, "f.json") is value
    for value in wrong:
        for call in (lambda v: expect(v, kinds, "k", "f.json"), lambda v: field({"k": v}, "k", kinds, "f.json", None)):
            with pytest.raises(ValueError, match=f"f.json: k is .*; {match}"):
                call(value)
        with pytest.raises(ValueError, match=rf"f.json: k\[1\] is .*; {match}"):
            items([right[0], value], kinds, "k", "f.json")


def test_what_is_missing_and_what_is_long():
    with pytest.raises(ValueError, match=r"f.json: a.b is missing"):
        field({}, "b", int, "f.json", inside="a")
    with pytest.raises(ValueError, match=r"f.json: a is a list of 3; expected an object"):
        field([1, 2, 3], "b", int, "f.json", inside="a")
    assert field({}, "b", int, "f.json", 7) == 7
    with pytest.raises(ValueError, match=r'k is "x{39}…; expected a list'):
        expect("x" * 1000, list, "k", "f.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested more than 100 levels deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 100 levels deep"),
        ("1" * 5000, "limit"),
        ('{"a": 1', "line 1, column 8"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\uDfff": 1}', "half of a surrogate pair"),
    ],
)
def test_what_python_does_not_read(tmp_path, text, match):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(error.value)
    assert parse("[" * 100 + "]" * 100, "here") and parse("{}", "here") == {}
    assert parse('"\\ud83e\\udd17"', "here") == "🤗"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pre_tokenizer": [1]}, "pre_tokenizer is a list of 1; expected an object or null"),
        ({"added_tokens": None}, "added_tokens is null; expected a list"),
        ({"added_tokens": [{"content": "x"}]}, r"added_tokens\[0\].id is missing"),
        ({"added_tokens": [{"content": 5, "id": 1}]}, r"added_tokens\[0\].content is 5; expected a text"),
        ({"added_tokens": [3]}, r"added_tokens\[0\] is 3; expected an object"),
        ({"added_tokens": {}}, "added_tokens is an object of 0; expected a list"),
        ({"model": {"merges": 5}}, "model.merges is 5; expected a list"),
        ({"model": {"merges": [None]}}, r"model.merges\[0\] is null; expected a text or a list"),
        ({"model": {"merges": [["a", 1]]}}, r"model.merges\[0\] is a list of 2; expected two tokens"),
        ({"model": {"merges": ["a b c"]}}, r'model.merges\[0\] is "a b c"; expected two tokens'),
        ({"model": {"vocab": []}}, "model.vocab is a list of 0; expected an object"),
        ({"model": {"vocab": {"a": 1.5}}}, 'the id of "a" is 1.5; expected a whole number'),
        ({"model": {"vocab": {"a": 2**63}}}, 'the id of "a" is 9223372036854775808; expected 0 to 2147483646'),
        (
            {"normalizer": {"type": "Lowercase"}, "model": {"continuing_subword_prefix": "🤗"}},  # a panic there
            "the tokenizers library refuses these files",
        ),
        ({"model": 4}, "not a tokenizer that gptfast supports"),
        ({"kind": [1]}, "kind is a list of 1; expected a text or null"),
    ],
)
def test_tokenizer_files_with_wrong_values(tmp_path, change, match):
    tokenizer = BPETokenizer.train("to be or not to be " * 9, 260)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=tokenizer.vocab, merges=tokenizer.merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    fast = json.loads(theirs.to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    assert load_tokenizer(tmp_path).encode("to be") == tokenizer.encode("to be")
    whole = {
        **fast,
        **{k: {**fast["model"], **v} if isinstance(v, dict) and k == "model" else v for k, v in change.items()},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=match) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("settings", [{"eos_token": [1]}, {"eos_token": 5}, {"eos_token": {"content": None}}, 7])
def test_settings_of_tokenizers(tmp_path, settings):
    BPETokenizer.train("to be or not to be " * 9, 260).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: .* is .*; expected"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("files", [{"merges.txt": "Q Z\n"}, {"vocab.json": '{"a</w>": 0}'}])
def test_what_does_not_fit_together_names_the_folder(tmp_path, files):
    BPETokenizer.train("to be or not to be " * 9, 260).save(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="vocab") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "key", ["n_positions", "model_type", "activation_function", "tie_word_embeddings", "embd_pdrop"]
)
@pytest.mark.parametrize("value", [[1], {}, "7" * 99, 10**30])
def test_values_of_config_json(tmp_path, key, value):
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"{key}|block_size") as error:
        read_settings(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("index", [{"weight_map": {"a": 1}}, {"weight_map": [1]}, {}, 3, {"weight_map": {"a": "../b"}}])
def test_an_index_with_wrong_values(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: "):
        weight_files(tmp_path)


STATE = {"step": 3, "planned_steps": None, "best_val_loss": 1.5, "best_step": 2, "seconds": 4.5}
TRAINER = {
    "version": 2,
    "state": STATE,
    "dropout": [1, 2],
    "threads": 2,
    "gemm": {},
    "source": {"data": "x", "options": {"tokenizer": None}, "marks": {}},
    "config": {"batch_size": 3},
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"state": {**STATE, "step": "3"}}, 'state.step is "3"; expected a whole number'),
        ({"state": {**STATE, "more": 3}}, "state has more, which this version does not know"),
        ({"state": {k: v for k, v in STATE.items() if k != "seconds"}}, "state.seconds is missing"),
        ({"state": None}, "state is null; expected an object"),
        ({"dropout": [1]}, r"dropout is \[1\]; expected a seed and a step"),
        ({"dropout": [1, -2]}, r"dropout is \[1, -2\]; expected a seed and a step"),
        ({"dropout": ["a", 2]}, r'dropout\[0\] is "a"; expected a whole number'),
        ({"dropout": 5}, "dropout is 5; expected a list"),
        ({"threads": "2"}, 'threads is "2"; expected a whole number'),
        ({"gemm": {"nt": 4}}, "gemm.nt is 4; expected a text"),
        ({"source": {"data": "x", "options": {}}}, "source.options.tokenizer is missing"),
        ({"source": {"data": 1}}, "source.data is 1; expected a text"),
        ({"config": {"batch_size": "3"}}, "batch_size is '3'; expected an int"),
        ({"config": {"batch": 3}}, "unexpected keyword argument 'batch'"),
        ({"version": 3}, "expected version 2 of a training checkpoint"),
    ],
)
def test_trainer_json(tmp_path, change, match):
    (tmp_path / "trainer.json").write_text(json.dumps(TRAINER))
    assert read_checkpoint(tmp_path).config == TrainConfig(batch_size=3)
    (tmp_path / "trainer.json").write_text(json.dumps({**TRAINER, **change}))
    with pytest.raises(ValueError, match=match) as error:
        check_source(read_checkpoint(tmp_path))
    assert str(tmp_path / "trainer.json") in str(error.value)


@pytest.mark.parametrize(
    "line", ["3", '{"step": "3"}', '{"step": 3, "loss": "low"}', '{"step": true}', "{", "[" * 99999]
)
def test_log_jsonl(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": 2.5}}\n{line}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2.* it is not a record of a training log"):
        read_log(tmp_path / "log.jsonl")
