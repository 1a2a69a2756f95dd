"""The grammar of JSON: what it lets through parses, what it refuses does not, and texts under it are objects."""

from __future__ import annotations

import json
import random

import pytest
import torch

from gptfast.generation import Request, Scheduler
from gptfast.generation.config import GenerationConfig
from gptfast.generation.json_grammar import BLANKS, DEPTH, DONE, START, JsonGrammar, json_grammar, step
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer, lenient
from tests.finetuning.models import gpt
from tests.support.chat_templates import tokenizer_with

GOOD = [
    "{}",
    '{"a":1}',
    ' {"a" : [1, -2.5e+3, 0, 1E9, 0.5, true, false, null, "x", [], {}], "b": {"c": {}}}',
    '{"\\u00e9\\n\\"\\\\": "é 🐈", "": ""}',
    '{"a": [[[1]]],\n\t"b": -0}',
]
BAD = [
    "[]",
    '"a"',
    '{"a"}',
    '{"a":}',
    '{"a":1,}',
    "{,}",
    "{1:2}",
    '{"a":01}',
    '{"a":1.}',
    '{"a":.5}',
    '{"a":+1}',
    '{"a":1e}',
    '{"a":-}',
    '{"a":tru}',  # codespell:ignore
    '{"a":"\n"}',
    '{"a":"\\x"}',
    '{"a":"\\u12g4"}',
    '{"a":[1,]}',
    '{"a":[1}',
    "{'a':1}",
    '{"a":1}}',
    '{"a":1} ',
    '{"a":NaN}',
]


def run(text: str):
    state = START
    for byte in text.encode():
        state = state and step(state, byte)
    return state


@pytest.mark.parametrize("text", GOOD)
def test_objects(text):
    json.loads(text)
    assert run(text) == DONE
    assert all(run(text[:n]) not in (None, DONE) for n in range(len(text)))


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_object(text):
    assert run(text) is None


def test_bounds():
    assert run('{"a":' * (DEPTH - 1)) is not None and run('{"a":' * DEPTH + "{") is None
    assert run("{" + " " * BLANKS) is not None and run("{" + " " * (BLANKS + 1)) is None


def test_masks_are_what_each_token_alone_says():
    tokenizer = lenient(GPT2Tokenizer())
    grammar = JsonGrammar(tokenizer, 50304)
    rng = random.Random(0)
    texts = [tokenizer.decode_bytes([i]) for i in range(50256)]
    for text in ("", "{", '{"a', '{"a"', '{"a": ', '{"a": [1', '{"a": [1.', '{"a": "\\', '{"a": tr', '{"a": {"b": []'):
        state, new = run(text), tokenizer.encode(text)
        allowed = grammar.allowed(new)
        assert allowed.shape == (50304,) and not allowed[50256:].any(), "neither <|endoftext|> nor ids without a token"
        some = [
            *rng.sample(range(50256), 3000),
            *tokenizer.encode('{}[]":,0-+.eE tfn\\'),
            *allowed.nonzero().flatten()[:500],
        ]
        for token in map(int, some):
            after = state
            for byte in texts[token]:
                after = after and step(after, byte)
            assert bool(allowed[token]) == (after is not None), (text, texts[token])
    whole = tokenizer.encode('{"a": [1, {"b": null}]}')
    assert grammar.complete(whole) and not grammar.complete(whole[:-1]) and not grammar.allowed(whole).any()


def test_any_way_through_the_masks_comes_to_an_object():
    used = tokenizer_with("chatml")
    grammar, rng = json_grammar(used, 310), random.Random(1)
    assert json_grammar(used, 310) is grammar
    special = set(used.specials.values())
    for _ in range(30):
        new: list[int] = []
        while not grammar.complete(new):
            choices = grammar.allowed(new).nonzero().flatten().tolist()
            assert choices and not special & set(choices)
            closing = [t for t in choices if used.decode_bytes([t]) in (b'"', b"}", b"]", b"0")]
            new.append(rng.choice(closing if closing and len(new) > 40 else choices))
        json.loads(used.decode(new))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 5}, {"min_p": 0.01, "temperature": 2.0}])
def test_texts_of_a_model_are_objects(options):
    used = tokenizer_with("")
    model, grammar = gpt(used.vocab_size), json_grammar(used, used.vocab_size)
    close = {used.encode(c)[0]: 6.0 for c in '"}'}
    config = GenerationConfig(max_new_tokens=40, seed=3, logit_bias=close, **options)
    free = GenerationConfig(max_new_tokens=40, seed=3, logit_bias=close, **options)
    scheduler = Scheduler(model, max_rows=4)
    bound = [Request([5, n], config, used, grammar=grammar) for n in range(3)]
    beside = Request([5, 1], free, used)
    for request in (*bound, beside):
        scheduler.submit_request(request)
    while scheduler.running or scheduler.waiting:
        scheduler.step(4)
    for request in bound:
        [sequence] = request.sequences
        text = used.decode(sequence.new)
        if sequence.finish == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert run(text) not in (None, DONE)
    assert any(request.sequences[0].finish == "stop" for request in bound)
    alone = model.generate([[5, 1]], max_new_tokens=40, seed=3, logit_bias=close, tokenizer=used, **options)
    assert beside.sequences[0].tokens == alone[0], "the text beside them is as without them"


def test_a_vocabulary_without_braces():
    with pytest.raises(ValueError, match=r"this model's vocabulary cannot write JSON: it has no token for '\{'"):
        json_grammar(CharTokenizer.train("to be"), 6)


def test_a_damaged_model_is_still_noticed():
    used = tokenizer_with("")
    model = gpt(used.vocab_size)
    model.wpe.weight.data[1] = float("nan")
    scheduler = Scheduler(model, max_rows=1)
    config = GenerationConfig(max_new_tokens=4, temperature=0)
    request = scheduler.submit_request(Request([5, 6], config, used, grammar=json_grammar(used, used.vocab_size)))
    with torch.no_grad():
        scheduler.step()
    assert "nan" in str(request.error)
