"""Tokenizers that put tokens before and behind a text, as Llama's: once a row, and never inside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from gptfast.evaluation import needle
from gptfast.evaluation.labels import encode_pair
from gptfast.finetuning import TaskModel, response_mask
from gptfast.finetuning.example_files import read_examples
from gptfast.finetuning.texts import text_rows
from gptfast.serving.app import create_app
from gptfast.tokenizer import HFTokenizer, lenient, load_tokenizer
from gptfast.tokenizer.base import encode_part, first_tokens
from gptfast.tokenizer.chat import encode_bare
from tests.finetuning.models import bpe, gpt

FIRST, END = "<s>", "<|endoftext|>"


def with_ends(folder: Path, **settings: object) -> HFTokenizer:
    """The small BPE with a first token, and the settings that say where it goes."""
    used = bpe()
    used.save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": FIRST, **settings}))
    return load_tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path: Path) -> HFTokenizer:
    return with_ends(tmp_path, add_bos_token=True)


def test_parts_of_a_text_have_no_ends(tokenizer: HFTokenizer, tmp_path: Path):
    plain, first = bpe(), tokenizer.specials[FIRST]
    assert tokenizer.encode("the cat") == [first, *plain.encode("the cat")]
    for one in (tokenizer, lenient(tokenizer), plain):
        assert encode_part(one, "the cat<|endoftext|>") == plain.encode("the cat<|endoftext|>")
        assert encode_bare(one, "the cat<|endoftext|>") == plain.encode("the cat<|endoftext|>", "all")
    assert first_tokens(tokenizer) == first_tokens(lenient(tokenizer)) == [first] and first_tokens(plain) == []
    both = with_ends(tmp_path / "both", add_bos_token=True, add_eos_token=True)
    assert first_tokens(both) == [first] and encode_part(both, "the cat") == plain.encode("the cat")


def test_a_response_follows_its_prompt(tokenizer: HFTokenizer):
    plain, first = bpe(), tokenizer.specials[FIRST]
    prompt, response = [first, *plain.encode("the cat")], [*plain.encode(" sat on the log"), tokenizer.eos_id]
    found = response_mask({"prompt": "the cat", "response": " sat on the log"}, tokenizer)
    assert found == ([*prompt, *response], [0] * len(prompt) + [1] * len(response))


def test_a_text_ends_once(tmp_path: Path):
    used = with_ends(tmp_path, add_bos_token=True, add_eos_token=True)
    (tmp_path / "a.jsonl").write_text('{"text": "the cat sat"}\n')
    rows, _ = text_rows(read_examples(tmp_path / "a.jsonl", "lm"), used, 64)
    assert rows[0][0] == [used.specials[FIRST], *bpe().encode("the cat sat"), used.eos_id]


def test_texts_of_a_task_stand_between_its_delimiters(tokenizer: HFTokenizer):
    example = {"premise": "the cat sat", "hypothesis": "the dog"}
    model = TaskModel(gpt(tokenizer.vocab_size), "entailment", tokenizer=tokenizer)
    row = model.encode(example)
    assert tokenizer.specials[FIRST] not in row[1:]
    assert [i for i in row if i < bpe().vocab_size and i != bpe().eos_id] == [
        *bpe().encode("the cat sat"),
        *bpe().encode("the dog"),
    ]


def test_an_answer_that_is_encoded_alone(tokenizer: HFTokenizer):
    """Where a token would span the join of prompt and answer."""
    plain, first = bpe(), tokenizer.specials[FIRST]
    spans = next(t for t in plain.vocab if t.isalpha() and t.isascii() and len(t) > 1 and len(plain.encode(t)) == 1)
    before, after = encode_pair(tokenizer, spans[:1], spans[1:])
    assert (before, after) == ([first, *plain.encode(spans[:1])], plain.encode(spans[1:]))


def test_a_haystack_begins_once(tokenizer: HFTokenizer):
    filler = encode_part(tokenizer, "the cat sat on the mat. ")
    for n in (200, 300):
        prompt, answer = needle._prompt(tokenizer, filler, n, 0.5, "12345")
        assert len(prompt) + len(answer) == n and [i for i in prompt if i == tokenizer.specials[FIRST]] == prompt[:1]


def test_a_continuation_follows_its_prompt(tokenizer: HFTokenizer):
    model = gpt(tokenizer.vocab_size).compile_for_inference()
    with TestClient(create_app(model, tokenizer, "small")) as client:
        asked = [
            client.post("/next_tokens", json={"model": "small", "prompt": prompt, "continuation": rest}).json()
            for prompt, rest in (("the cat sat", ""), ("the cat", " sat"))
        ]
    assert [found["prompt_tokens"] for found in asked] == [len(tokenizer.encode("the cat sat"))] * 2
    assert asked[0]["tokens"] == asked[1]["tokens"]
