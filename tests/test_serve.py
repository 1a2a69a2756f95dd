"""gptfast serve, through the real openai client and raw HTTP: texts, errors, and what happens to those who leave."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from generation_pairs import sharpen
from test_cli_generate import LETTERS, save_model

from gptfast import GPT, GPTConfig
from gptfast.backend import has_cpu_ops
from gptfast.engine import EngineSequences
from gptfast.generation import GenerationConfig, Request, Token, score
from gptfast.generation.stopping import Stopping
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from gptfast.serving.app import Limits, create_app  # noqa: E402 (fastapi may be missing)
from gptfast.serving.scoring import score_in_pieces  # noqa: E402
from gptfast.serving.server import GracefulServer  # noqa: E402
from gptfast.serving.text import ChoiceText, token_text  # noqa: E402
from gptfast.serving.worker import Ticket  # noqa: E402

BLOCK = 48


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer.train(LETTERS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=tokenizer.vocab_size)
    model = GPT(config).eval()
    sharpen(model)
    return model


class Gated:
    """The model, but each step waits for `gate`, and raises `failure` once where there is one."""

    def __init__(self, model):
        self.model, self.config, self.failure, self.steps = model, model.config, None, 0
        self.gate = threading.Event()
        self.gate.set()

    def sequences(self, rows, max_len):
        sequences = self.model.sequences(rows, max_len)
        extend = sequences.extend

        def gated(*args, **options):
            assert self.gate.wait(30)
            self.steps += 1
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
            return extend(*args, **options)

        sequences.extend = gated
        return sequences


@contextmanager
def serving(app, grace=0.0):
    """The base URL of a running server."""
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=int(grace) + 1)
    server = GracefulServer(config)
    server.grace = grace
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def gated(model):
    return Gated(model)


@pytest.fixture(scope="module")
def app(gated, tokenizer):
    return create_app(gated, tokenizer, "bard", Limits(max_rows=4, max_queue=3, max_body=20_000))


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def new_text(model, tokenizer, prompt, **options):
    ids = tokenizer.encode(prompt)
    return [tokenizer.decode(row[len(ids) :]) for row in model.generate([ids], **options)]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- texts ----


def test_a_completion_is_what_generate_writes(client, model, tokenizer):
    got = client.completions.create(model="bard", prompt="ROMEO:", max_tokens=20, temperature=0.7, top_p=0.9, seed=5)
    options = {"max_new_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert [got.choices[0].text] == new_text(model, tokenizer, "ROMEO:", **options)
    assert (got.choices[0].finish_reason, got.model, got.object) == ("length", "bard", "text_completion")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (6, 20, 26)
    assert len(client.completions.create(model="bard", prompt="ROMEO:").choices[0].text) == 16
    ids = client.completions.create(model="bard", prompt=tokenizer.encode("ROMEO:"), max_tokens=5, temperature=0)
    assert [ids.choices[0].text] == new_text(model, tokenizer, "ROMEO:", max_new_tokens=5, temperature=0)


def test_every_form_of_a_prompt_and_of_a_stop(client, model, tokenizer):
    ask = {"model": "bard", "max_tokens": 8, "seed": -3, "temperature": 1.2, "user": "someone"}
    options = {"max_new_tokens": 8, "seed": 2**64 - 3, "temperature": 1.2}
    texts = ["to be", "or"]
    expected = [new_text(model, tokenizer, text, **options)[0] for text in texts]
    for prompt in (texts, [tokenizer.encode(text) for text in texts]):
        got = client.completions.create(prompt=prompt, **ask)
        assert [choice.text for choice in got.choices] == expected
    for stop in (expected[0][3], [expected[0][3]], ["zzz", "zz", "zzzz", expected[0][3:5]]):
        got = client.completions.create(prompt="to be", stop=stop, **ask).choices[0]
        assert got.finish_reason == "stop" and got.text == expected[0][: min(expected[0].index(stop[-1]), 3)]
    for nothing in ([], None):
        got = client.completions.create(prompt="to be", stop=nothing, best_of=1, suffix=None, logit_bias={}, **ask)
        assert got.choices[0].text == expected[0]


def test_without_a_seed_every_answer_is_another(client):
    texts = {client.completions.create(model="bard", prompt="a", temperature=2.0).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_streams_join_to_the_whole(client, model, tokenizer):
    ask = {"model": "bard", "prompt": ["to be", "or"], "n": 2, "max_tokens": 12, "seed": 2, "temperature": 1.5}
    whole = client.completions.create(**ask)
    texts, reasons, sent, usage = [""] * 4, [None] * 4, 0, None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            sent += 1
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in whole.choices] and sent >= 8 and usage.completion_tokens == 48
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["length"] * 4
    options = {"max_new_tokens": 12, "seed": 2, "temperature": 1.5, "num_return_sequences": 2}
    assert texts == new_text(model, tokenizer, "to be", **options) + new_text(model, tokenizer, "or", **options)


def test_what_comes_in_a_short_time_is_sent_together(model, tokenizer):
    app = create_app(model, tokenizer, "bard", Limits(max_events=10))
    ask = {"model": "bard", "prompt": "to be", "max_tokens": 40, "seed": 2, "logprobs": 1}
    with serving(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="x") as client:
        parts = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
        whole = client.completions.create(**ask).choices[0]
    assert len(parts) < 10 and "".join(part.text for part in parts) == whole.text
    told = [part.logprobs for part in parts if part.logprobs]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for logprobs in told for value in getattr(logprobs, name)] == getattr(whole.logprobs, name)
    assert len(told[0].tokens) < 40, "the first does not wait for the others"


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_is_not_streamed_wakes_nobody_until_it_is_whole(streams):
    config = GenerationConfig()
    request = Request([1], config, Stopping(config))
    tokens = [Token(request, 0, n, None, []) for n in range(3)]

    async def follow():
        ticket, got = Ticket([request], streams), []

        async def collect():
            async for events in ticket.events(30):
                got.append(len(events))

        collecting = asyncio.ensure_future(collect())
        for events in ([tokens[0]], tokens[1:], [request]):
            await asyncio.sleep(0.01)
            ticket.send(events)
        await collecting
        return got

    assert asyncio.run(follow()) == ([1, 2, 1] if streams else [4])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_text_and_are_not_in_it(client, model, tokenizer, stream):
    free = new_text(model, tokenizer, "to be", max_new_tokens=30, seed=4)[0]
    stops = [free[9:12], "zzzz"]
    answer = client.completions.create(model="bard", prompt="to be", max_tokens=30, seed=4, stop=stops, stream=stream)
    if stream:
        parts = [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in answer]
        text, reason = "".join(text for text, _ in parts), parts[-1][1]
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == free[: free.index(stops[0])] and reason == "stop"


def test_logprobs_and_echo(client, model, tokenizer):
    ask = {"model": "bard", "prompt": "to be", "max_tokens": 6, "temperature": 0.5, "seed": 1, "logprobs": 3}
    plain, echoed = client.completions.create(**ask), client.completions.create(**ask, echo=True)
    assert echoed.choices[0].text == "to be" + plain.choices[0].text
    ids = tokenizer.encode(echoed.choices[0].text)
    got = echoed.choices[0].logprobs
    assert got.tokens == list(echoed.choices[0].text) and got.text_offset == list(range(11))
    assert got.token_logprobs[0] is None and got.token_logprobs[1:] == pytest.approx(score(model, ids), abs=1e-3)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    for t in (1, 5, 10):
        best = logprobs[t - 1].topk(3)
        assert list(got.top_logprobs[t]) == [tokenizer.decode([i]) for i in best.indices.tolist()]
        assert list(got.top_logprobs[t].values()) == pytest.approx(best.values.tolist(), abs=1e-3)
    assert plain.choices[0].logprobs.tokens == got.tokens[5:] and plain.choices[0].logprobs.text_offset == list(
        range(6)
    )


def test_echo_alone_scores_a_text(client, model, tokenizer):
    ask = {"model": "bard", "prompt": ["to be", "a"], "max_tokens": 0, "echo": True, "logprobs": 0}
    got = client.completions.create(**ask)
    assert [choice.text for choice in got.choices] == ["to be", "a"] and got.usage.completion_tokens == 0
    assert got.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        score(model, tokenizer.encode("to be")), abs=1e-3
    )
    assert got.choices[1].logprobs.token_logprobs == [None] and got.choices[1].logprobs.top_logprobs is None


def test_streamed_logprobs_are_one_token_each(client):
    ask = {"model": "bard", "prompt": "to be", "max_tokens": 5, "logprobs": 1, "seed": 3}
    chunks = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    whole = client.completions.create(**ask).choices[0].logprobs
    assert [p for c in chunks if c.logprobs for p in c.logprobs.token_logprobs] == whole.token_logprobs


def test_bias_and_our_own_options(client, model, tokenizer):
    x = tokenizer.encode("x")[0]
    got = client.completions.create(model="bard", prompt="a", max_tokens=4, logit_bias={str(x): 100}, temperature=0)
    assert got.choices[0].text == "xxxx"
    extra = {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.5}
    got = client.completions.create(model="bard", prompt="a", max_tokens=9, seed=1, extra_body=extra)
    assert [got.choices[0].text] == new_text(model, tokenizer, "a", max_new_tokens=9, seed=1, **extra)
    for name in ("presence_penalty", "frequency_penalty"):
        got = client.completions.create(model="bard", prompt="a", max_tokens=30, temperature=0, **{name: 2.0})
        plain, penalised = (
            new_text(model, tokenizer, "a", max_new_tokens=30, temperature=0, **{name: p}) for p in (0, 2)
        )
        assert [got.choices[0].text] == penalised != plain


def test_whole_characters_and_end_tokens(tmp_path):
    """GPT-2's tokens split characters; the stream never sends half of one, and the end token has no text."""
    tokenizer = GPT2Tokenizer()
    model = save_model(tmp_path, tokenizer)
    with serving(create_app(model, tokenizer, "m")) as url, openai.OpenAI(base_url=url + "/v1", api_key="x") as client:
        hugs = tokenizer.encode("🤗")
        bias = {str(token): 100 for token in hugs}
        ask = {"model": "m", "prompt": "a", "max_tokens": 12, "logit_bias": bias, "seed": 3, "temperature": 2.0}
        texts = [chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)]
        assert "".join(texts) == client.completions.create(**ask).choices[0].text
        ask = {"model": "m", "prompt": "", "logit_bias": {str(tokenizer.eos_id): 100}}
        got = client.completions.create(**ask)
        assert (got.choices[0].text, got.choices[0].finish_reason, got.usage.prompt_tokens) == ("", "stop", 1)
    assert token_text(tokenizer, hugs[0]) == r"bytes:\xf0\x9f"


@pytest.mark.parametrize("stops", [["abc"], ["ba", "abab"], ["c "], ["aa"], ["x"]])
def test_text_is_held_back_only_while_it_may_be_a_stop(tokenizer, stops):
    for text in ("ababac aab c abcabc", "aaaa", "ab", "c c  "):
        choice = ChoiceText(tokenizer, stops, ())
        shown = "".join(choice.push(token) for token in tokenizer.encode(text)) + choice.finish()
        until = min((text.index(stop) + len(stop) for stop in stops if stop in text), default=len(text))
        expected = text[: min((text[:until].index(stop) for stop in stops if stop in text[:until]), default=until)]
        assert shown == expected


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_sixteen_streams_at_once_are_sixteen_single_runs(model, tokenizer, quantize):
    if quantize and not has_cpu_ops:
        pytest.skip("this install has no compiled part")
    model = model.compile_for_inference(quantize) if quantize else model
    app = create_app(model, tokenizer, "bard", Limits(max_rows=8, max_queue=8))
    prompts = ["to be"[: 1 + n % 5] + LETTERS[n] for n in range(16)]
    with serving(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:

        def ask(n):
            ask = {"model": "bard", "prompt": prompts[n], "max_tokens": 10 + n, "seed": n, "temperature": 1.3}
            return "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(ask, range(16)))
    for n, text in enumerate(texts):
        assert [text] == new_text(model, tokenizer, prompts[n], max_new_tokens=10 + n, seed=n, temperature=1.3)


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
@pytest.mark.parametrize(("max_events", "together"), [(1e9, set()), (1.0, {4})])
def test_tokens_that_are_sent_together_are_made_together(model, tokenizer, monkeypatch, max_events, together):
    """As many at once as go into a part of a stream; each request that comes cuts what runs short."""
    steps, interrupts, decode = [], [], EngineSequences.decode

    def watched(self, *args, **options):
        steps.append(options["steps"])
        return decode(self, *args, **options)

    monkeypatch.setattr(EngineSequences, "decode", watched)
    monkeypatch.setattr(EngineSequences, "interrupt", lambda self: interrupts.append(self))
    app = create_app(model.compile_for_inference("int8"), tokenizer, "bard", Limits(max_events=max_events))
    with serving(app) as url:
        answer = httpx.post(url + "/v1/completions", json={**ASK, "max_tokens": 34, "seed": 1})
        assert len(interrupts) >= 1
        assert set(steps) == together
    assert [answer.json()["choices"][0]["text"]] == new_text(model, tokenizer, "to be", max_new_tokens=34, seed=1)


# ---- other routes, keys ----


def test_models_and_health(client, url, app):
    assert [card.id for card in client.models.list()] == ["bard"]
    assert client.models.retrieve("bard").owned_by == "gptfast"
    assert httpx.get(url + "/health").json() == {"status": "ok", "sequences": 0}
    with pytest.raises(openai.NotFoundError, match="the model 'other' is not here; this is 'bard'"):
        client.models.retrieve("other")
    error = httpx.get(url + "/nowhere").json()["error"]
    assert (error["type"], error["code"]) == ("not_found_error", "unknown_url")
    assert error["message"].startswith("GET /nowhere is not here; there are POST /v1/completions, GET /v1/models")
    assert httpx.get(url + "/v1/completions").status_code == 405


def test_a_key_is_asked_for(model, tokenizer):
    with serving(create_app(model, tokenizer, "bard", api_key="sesame")) as url:
        with openai.OpenAI(base_url=url + "/v1", api_key="sesame") as client:
            assert client.completions.create(model="bard", prompt="a").choices
        with openai.OpenAI(base_url=url + "/v1", api_key="wrong") as client:
            for call in (client.models.list, lambda: client.completions.create(model="bard", prompt="a")):
                with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
                    call()
        bare = httpx.get(url + "/v1/models")
        assert bare.status_code == 401 and bare.headers["www-authenticate"] == "Bearer"
        assert httpx.get(url + "/health").status_code == 200


# ---- bad input ----


@pytest.mark.parametrize(
    ("body", "status", "param", "match"),
    [
        (b"{", 400, None, "body: Invalid JSON"),
        (b"[]", 400, None, "body: Input should be an object"),
        ({"prompt": "a"}, 400, "model", "model: Field required"),
        ({"model": "bard"}, 400, "prompt", "prompt: Field required"),
        ({"model": "other", "prompt": "a"}, 404, "model", "the model 'other' is not here"),
        (
            {"model": "bard", "prompt": "a", "max_tokens": "5"},
            400,
            "max_tokens",
            "max_tokens: Input should be a valid int",
        ),
        ({"model": "bard", "prompt": "a", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"model": "bard", "prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens=0 is for echo=true"),
        ({"model": "bard", "prompt": "a", "temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"model": "bard", "prompt": "a", "top_p": 0}, 400, "top_p", "greater than 0"),
        ({"model": "bard", "prompt": "a", "n": 5}, 400, "n", "n is 5; this server writes up to 4 texts at a time"),
        ({"model": "bard", "prompt": ["a"] * 4, "n": 2}, 400, "prompt", "4 prompts, n=2; this server takes up to 7"),
        (
            {"model": "bard", "prompt": [[1]] * 2000},
            400,
            "prompt",
            "2000 prompts, n=1; this server takes up to 7 texts",
        ),
        ({"model": "bard", "prompt": "a", "logprobs": 99}, 400, "logprobs", "less than or equal to 20"),
        ({"model": "bard", "prompt": "a", "best_of": 2}, 400, "best_of", "best_of other than n is not supported"),
        ({"model": "bard", "prompt": "a", "suffix": "b"}, 400, "suffix", "suffix is not supported"),
        ({"model": "bard", "prompt": "a", "presence_penalty": 2.1}, 400, "presence_penalty", "less than or equal to 2"),
        ({"model": "bard", "prompt": "a", "frequency_penalty": -3}, 400, "frequency_penalty", "than or equal to -2"),
        (
            {"model": "bard", "prompt": "a", "max_token": 1},
            400,
            "max_token",
            "max_token: Extra inputs are not permitted",
        ),
        ({"model": "bard", "prompt": "a", "stop": [""]}, 400, "stop", "expected 1 to 4 texts that are not empty"),
        ({"model": "bard", "prompt": "a", "stop": ""}, 400, "stop", "stop is ''; expected 1 to 4 texts"),
        ({"model": "bard", "prompt": "a", "stop": list("abcde")}, 400, "stop", "expected 1 to 4 texts"),
        ({"model": "bard", "prompt": "a", "stop": [1]}, 400, "stop", "stop: expected a text, or a list of up to 4"),
        ({"model": "bard", "prompt": "a", "stream_options": {}}, 400, "stream_options", "without stream=true"),
        (
            {"model": "bard", "prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}},
            *(400, "stream_options", "stream_options.include_obfuscation: Extra inputs are not permitted"),
        ),
        ({"model": "bard", "prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "holds 'x'; expected token ids"),
        ({"model": "bard", "prompt": "a", "logit_bias": {"1_0": 1}}, 400, "logit_bias", "holds '1_0'; expected token"),
        ({"model": "bard", "prompt": "a", "logit_bias": {"٣": 1}}, 400, "logit_bias", "expected token ids as keys"),
        (b'{"model": "bard", "prompt": "a", "logit_bias": {"1": NaN}}', 400, None, "expected a finite number"),
        (b'{"model": "bard", "prompt": "a", "temperature": NaN}', 400, "temperature", "temperature: Input should be"),
        (b'{"model": "bard", "prompt": "\\ud800"}', 400, None, "body: Invalid JSON"),
        (b'{"model": "bard", "prompt": ' + b"[" * 5000, 400, None, "body: Invalid JSON"),
        (b"\xff\xfe", 400, None, "body: Invalid JSON"),
        (b"", 400, None, "body: Invalid JSON"),
        ({"model": "bard", "prompt": "a", "logit_bias": {"99": 1}}, 400, None, "logit_bias holds token 99"),
        ({"model": "bard", "prompt": "a", "seed": -(2**63) - 1}, 400, "seed", "seed: Input should be greater than or"),
        ({"model": "bard", "prompt": "a", "seed": 1.5}, 400, "seed", "seed: Input should be a valid integer"),
        (
            {"model": "bard", "prompt": None},
            400,
            "prompt",
            "^prompt: expected a text, token ids, or a list of texts or",
        ),
        ({"model": "bard", "prompt": ["a", [1]]}, 400, "prompt", "^prompt: expected a text, token ids, or a list"),
        ({"model": "bard", "prompt": "€"}, 400, None, "'€' .* is not among the"),
        ({"model": "bard", "prompt": ""}, 400, None, "prompt is empty"),
        ({"model": "bard", "prompt": []}, 400, "prompt", "prompt holds nothing"),
        ({"model": "bard", "prompt": [[1], []]}, 400, None, "prompt is empty"),
        ({"model": "bard", "prompt": [99]}, 400, None, r"prompt holds token id 99; expected ids in \[0, 35\)"),
        ({"model": "bard", "prompt": [True]}, 400, "prompt", "prompt: expected a text, token ids"),
        (
            {"model": "bard", "prompt": "a" * 48},
            400,
            "prompt",
            "is 48 tokens; the prompt has 48 and max_tokens asks for 1",
        ),
        (
            {"model": "bard", "prompt": "a" * 19_000},
            400,
            "prompt",
            "the prompt has 19000 and max_tokens asks for 1 more",
        ),
        (
            {"model": "bard", "prompt": "a", "max_tokens": 48},
            *(400, "max_tokens", "the context of this model is 48 tokens; the prompt has 1 and max_tokens asks for 48"),
        ),
        ({"model": "bard", "prompt": "a", "max_tokens": 10**30}, 400, "max_tokens", "max_tokens"),
        ({"model": "bard", "prompt": "a" * 30_000}, 413, None, "the body has 300.. bytes, more than 20000; send less"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, (dict, bytes)) else "",
)
def test_bad_bodies_are_told_in_openais_shape(url, body, status, param, match):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(url + "/v1/completions", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert re.search(match, error["message"]), error
    assert status == 413 or error["param"] is None or error["param"].startswith(param or "-"), error
    assert param is None or error["param"] is not None


def test_a_body_without_a_length_is_limited_too(url):
    answer = httpx.post(url + "/v1/completions", content=(b"x" * 1000 for _ in range(40)))
    assert answer.status_code == 413 and "the body is over 20000 bytes" in answer.json()["error"]["message"]


def test_the_client_raises_bad_request(client):
    with pytest.raises(openai.BadRequestError, match="the prompt has 10 and max_tokens asks for 50 more") as error:
        client.completions.create(model="bard", prompt="to be or n", max_tokens=50)
    assert error.value.code == "context_length_exceeded"


def test_chat_is_not_here(client, url):
    with pytest.raises(openai.NotFoundError, match="continues texts and has no chat template") as error:
        client.chat.completions.create(model="bard", messages=[{"role": "user", "content": "hello"}])
    assert error.value.code == "unknown_url"
    assert "GET /v1/completions is not here; there are POST /v1/completions" in httpx.get(url + "/v1/completions").text


# ---- load, leaving, failure ----


@pytest.fixture
def closed(gated):
    """Steps wait from now on, until the test opens the gate."""
    gated.gate.clear()
    yield gated.gate
    gated.gate.set()


ASK = {"model": "bard", "prompt": "to be", "max_tokens": 40}


def test_more_than_the_queue_holds_is_429_and_later_it_goes_on(url, app, closed, client):
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(httpx.post, url + "/v1/completions", json=ASK, timeout=30) for _ in range(7)]
        wait_until(lambda: app.state.worker.open_sequences == 7)
        with pytest.raises(openai.RateLimitError, match="too many requests run and wait; try again later"):
            client.completions.create(**ASK)
        assert httpx.get(url + "/health").json()["sequences"] == 7
        closed.set()
        assert [answer.result().status_code for answer in asked] == [200] * 7
    assert client.completions.create(**ASK).choices


def cancelled(app):
    """How many requests the worker is about to give up."""
    return sum("cancel" in command.__qualname__ for command in app.state.worker._commands)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(url, app, closed, stream):
    """Four clients fill the rows, a fifth waits; all leave before the model has made a step of it."""

    def leave_after_a_while():
        timeout = httpx.Timeout(10, read=0.2)
        with httpx.stream("POST", url + "/v1/completions", json={**ASK, "stream": stream}, timeout=timeout) as answer:
            next(answer.iter_bytes())

    for _ in range(5):
        with pytest.raises(httpx.ReadTimeout):
            leave_after_a_while()
    wait_until(lambda: cancelled(app) == 5)
    closed.set()
    wait_until(lambda: app.state.worker.open_sequences == 0)
    scheduler = app.state.worker.scheduler
    wait_until(lambda: scheduler.running == scheduler.waiting == 0)
    assert scheduler._sequences.lengths == [0] * 4


def test_a_client_that_leaves_amid_its_stream_frees_its_row_at_once(url, app, gated):
    others = []
    with httpx.stream("POST", url + "/v1/completions", json={**ASK, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        gated.gate.clear()
        others = [
            threading.Thread(target=httpx.post, args=(url + "/v1/completions",), kwargs={"json": ASK, "timeout": 60})
        ]
        [thread.start() for thread in others]
        wait_until(lambda: app.state.worker.open_sequences == 2)
    before = gated.steps
    wait_until(lambda: cancelled(app) == 1)
    gated.gate.set()
    wait_until(lambda: app.state.worker.open_sequences <= 1)
    assert gated.steps - before < 40
    [thread.join() for thread in others]
    wait_until(lambda: app.state.worker.open_sequences == 0)


def test_what_takes_too_long_is_given_up(model, tokenizer):
    gated = Gated(model)
    app = create_app(gated, tokenizer, "bard", Limits(seconds=0.3))
    with serving(app) as url:
        gated.gate.clear()
        whole = httpx.post(url + "/v1/completions", json=ASK, timeout=20)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        streamed = httpx.post(url + "/v1/completions", json={**ASK, "stream": True}, timeout=20)
        assert "the completion was not ready in time" in streamed.text and "[DONE]" not in streamed.text
        gated.gate.set()
        wait_until(lambda: app.state.worker.open_sequences == 0)


def test_a_step_that_fails_is_500_and_the_server_goes_on(url, app, gated, client, model, tokenizer):
    gated.failure = MemoryError("no memory")
    with pytest.raises(openai.InternalServerError, match="no memory"):
        client.completions.create(**ASK)
    gated.failure = RuntimeError("a broken step")
    with pytest.raises(openai.APIError, match="a broken step"):
        list(client.completions.create(**ASK, stream=True))
    got = client.completions.create(**ASK, seed=1)
    assert [got.choices[0].text] == new_text(model, tokenizer, "to be", max_new_tokens=40, seed=1)
    assert app.state.worker.open_sequences == 0


def test_one_request_without_a_token_left_fails_alone(client, tokenizer):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        good = pool.submit(client.completions.create, **ASK)
        bias = {str(n): -1e39 for n in range(tokenizer.vocab_size)}
        with pytest.raises(openai.InternalServerError, match="no token is left to choose"):
            client.completions.create(**ASK, logit_bias=bias)
        assert good.result().choices


def test_stopping_the_server_ends_what_runs(model, tokenizer):
    gated = Gated(model)
    app = create_app(gated, tokenizer, "bard")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with serving(app) as url:
            gated.gate.clear()
            asked = pool.submit(httpx.post, url + "/v1/completions", json=ASK, timeout=20)
            wait_until(lambda: app.state.worker.open_sequences == 1)
            threading.Timer(2.5, gated.gate.set).start()
        assert not app.state.worker.alive and app.state.worker.open_sequences == 0
        with pytest.raises(httpx.HTTPError):
            asked.result().raise_for_status()


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
def test_a_mixed_soak_leaves_nothing_behind():
    """The short form of scripts/soak_server.py."""
    scripts = os.path.join(os.path.dirname(__file__), "..", "scripts")
    done = subprocess.run(
        [sys.executable, os.path.join(scripts, "soak_server.py"), "--requests", "200"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_streams_are_told_that_the_server_stops(model, tokenizer):
    """One that ends within the grace is whole; one that does not is told, and so is a scoring."""
    gated = Gated(model)
    app = create_app(gated, tokenizer, "bard", Limits(max_rows=1))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        with serving(app, grace=0.5) as url:
            gated.gate.clear()
            posts = [{**ASK, "stream": True}, {**ASK}, {**ASK, "max_tokens": 0, "echo": True, "logprobs": 1}]
            asked = [pool.submit(httpx.post, url + "/v1/completions", json=body, timeout=20) for body in posts]
            wait_until(lambda: app.state.worker.open_sequences == 3)
            threading.Timer(1.0, gated.gate.set).start()
        streamed, *others = [answer.result() for answer in asked]
    assert streamed.status_code == 200 and "[DONE]" not in streamed.text
    assert '"code": "shutting_down"' in streamed.text.splitlines()[-2]
    for answer in others:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"] == "5"
    assert not app.state.worker.alive


def test_what_runs_may_end_when_the_server_stops(model, tokenizer):
    gated = Gated(model)
    app = create_app(gated, tokenizer, "bard")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with serving(app, grace=10) as url:
            gated.gate.clear()
            asked = pool.submit(httpx.post, url + "/v1/completions", json={**ASK, "stream": True}, timeout=20)
            wait_until(lambda: app.state.worker.open_sequences == 1)
            threading.Timer(0.5, gated.gate.set).start()
        assert asked.result().text.endswith("data: [DONE]\n\n")


# ---- scoring prompts, long prompts ----


@pytest.mark.parametrize("quantize", [None, "fp32"])
def test_pieces_are_the_whole(model, monkeypatch, quantize):
    if quantize and not has_cpu_ops:
        pytest.skip("this install has no compiled part")
    ids = [n * 7 % 35 for n in range(40)]
    for piece in (1, 7, 39, 64):
        monkeypatch.setattr("gptfast.serving.scoring.PIECE", piece)
        pieces, count = score_in_pieces(model.compile_for_inference(quantize) if quantize else model, ids, 2), 0
        try:
            while True:
                next(pieces)
                count += 1
        except StopIteration as end:
            scored = end.value
        assert count == -(-39 // piece)
        assert [logprob for logprob, _ in scored] == pytest.approx(score(model, ids), abs=1e-3)
        with torch.no_grad():
            best = model(torch.tensor([ids]))[0, :-1].softmax(-1).topk(2)
        assert [[token for token, _ in likely] for _, likely in scored] == best.indices.tolist()
        assert [p for _, likely in scored for _, p in likely] == pytest.approx(best.values.flatten().tolist(), abs=1e-3)


def test_texts_go_on_between_the_pieces_of_a_scoring(app, closed, url, monkeypatch):
    made = []

    def watched(*args):
        pieces = score_in_pieces(*args)
        while True:
            made.append([row.made for request in app.state.worker.scheduler._running for row in request.rows])
            try:
                next(pieces)
            except StopIteration as end:
                return end.value
            yield

    monkeypatch.setattr("gptfast.serving.app.score_in_pieces", watched)
    monkeypatch.setattr("gptfast.serving.scoring.PIECE", 1)
    scoring = {**ASK, "prompt": "a" * 20, "max_tokens": 0, "echo": True, "logprobs": 1}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = []
        for body in (ASK, scoring):
            asked.append(pool.submit(httpx.post, url + "/v1/completions", json=body, timeout=20))
            wait_until(lambda: app.state.worker.open_sequences == len(asked))
        closed.set()
        assert [answer.result().status_code for answer in asked] == [200] * 2
    assert made == [[n] for n in range(made[0][0], made[0][0] + 20)], "a token between two pieces"


def test_scorings_are_counted_and_limited(url, app, closed, client):
    ask = {"model": "bard", "prompt": "to be", "max_tokens": 0, "echo": True, "logprobs": 1}
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(httpx.post, url + "/v1/completions", json=ask, timeout=30) for _ in range(7)]
        wait_until(lambda: app.state.worker.open_sequences == 7)
        with pytest.raises(openai.RateLimitError, match="too many requests run and wait"):
            client.completions.create(**ask)
        closed.set()
        assert [answer.result().status_code for answer in asked] == [200] * 7
    assert app.state.worker.open_sequences == 0


def test_a_scoring_that_fails_or_takes_too_long(model, tokenizer):
    gated = Gated(model)
    app = create_app(gated, tokenizer, "bard", Limits(seconds=0.3))
    ask = {"model": "bard", "prompt": "to be", "max_tokens": 0, "echo": True, "logprobs": 1}
    with serving(app) as url:
        gated.failure = MemoryError("no memory")
        failed = httpx.post(url + "/v1/completions", json=ask)
        assert (failed.status_code, failed.json()["error"]["message"]) == (500, "no memory")
        gated.gate.clear()
        late = httpx.post(url + "/v1/completions", json=ask, timeout=20)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        gated.gate.set()
        assert app.state.worker.open_sequences == 0
        assert httpx.post(url + "/v1/completions", json=ask).status_code == 200


def test_a_long_prompt_keeps_nobody_waiting(url, tokenizer, monkeypatch):
    """Its tokens are found beside the event loop, which answers others meanwhile."""
    gate, original = threading.Event(), CharTokenizer.encode
    monkeypatch.setattr(CharTokenizer, "encode", lambda self, text: (gate.wait(20), original(self, text))[1])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, url + "/v1/completions", json={**ASK, "prompt": "a" * 18_000}, timeout=30)
        try:
            time.sleep(0.2)
            assert httpx.get(url + "/health", timeout=5).status_code == 200 and not asked.done()
        finally:
            gate.set()
        assert asked.result().json()["error"]["code"] == "context_length_exceeded"


# ---- the command ----


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [[], ["--quantize", "fp32"]], ids=["torch", "engine"])
def test_the_command_serves_until_it_is_told_to_stop(quantize, tmp_path, tokenizer):
    model = save_model(tmp_path / "bard", tokenizer, BLOCK)
    code = "import sys; from gptfast.cli import main; main()"
    args = [sys.executable, "-c", code, "serve", "--model", str(tmp_path / "bard"), "--port", "0", *quantize]
    env = {**os.environ, "GPTFAST_API_KEY": "sesame"}
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"running on (http://127.0.0.1:\d+)", line):
                break
        with openai.OpenAI(base_url=found[1] + "/v1", api_key="sesame") as client:
            got = client.completions.create(model="bard", prompt="ROMEO:", max_tokens=7, temperature=0)
        assert [got.choices[0].text] == new_text(model, tokenizer, "ROMEO:", max_new_tokens=7, temperature=0)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 can be reached from other machines, and there is no API key; set GPTFAST",
        ),
        (["--host", "example.org"], "--host example.org can be reached from other machines"),
        (["--port", "70000"], "--port is 70000; expected 0 to 65535"),
        (["--batch-size", "0"], "--batch-size is 0 and --max-queue 64; expected at least 1 and 0"),
        (["--timeout", "nan"], "--timeout is nan; expected seconds > 0"),
        (["--port", "0"], "nowhere is not a folder"),
        (["--host", "0.0.0.0", "--no-auth", "--port", "0"], "nowhere is not a folder"),
        (
            ["--host", "192.0.2.1", "--no-auth", "--port", "0"],
            "serve: cannot listen at 192.0.2.1, port 0: Cannot assign requested address; choose another --port, or a --host",
        ),
    ],
)
def test_errors_of_the_command(monkeypatch, capsys, args, match):
    from gptfast.cli import main

    monkeypatch.delenv("GPTFAST_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["gptfast", "serve", "--model", "./nowhere", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and match in capsys.readouterr().err


def test_a_port_in_use_is_told_before_a_model_is_loaded(monkeypatch, capsys):
    from gptfast.cli import main

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["gptfast", "serve", "--model", "./nowhere", "--port", port])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 1
    assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys):
    from gptfast.cli import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "gptfast.serving.server")
    monkeypatch.setattr(sys, "argv", ["gptfast", "serve", "--model", "x"])
    with pytest.raises(SystemExit):
        main()
    assert "serve: uvicorn is not installed; pip install 'gptfast[serve]'" in capsys.readouterr().err
