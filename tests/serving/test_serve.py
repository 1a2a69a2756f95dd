"""gptfast serve, through the real openai client and raw HTTP: texts, routes, and errors for bad input."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import json
import math
import re
import threading
import time

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.backend import has_cpu_ops
from gptfast.engine import EngineRunner
from gptfast.generation import GenerationConfig, Request, Token, score
from gptfast.generation.sampling import NAN
from gptfast.generation.scheduler import Scheduler
from gptfast.serving.app import Limits, create_app
from gptfast.serving.choices import prompt_logprobs
from gptfast.serving.submission import Submission
from gptfast.serving.text import ChoiceText, printable_token
from gptfast.tokenizer import GPT2Tokenizer
from tests.support.command import LETTERS, save_model
from tests.support.serving_app import ASK, BLOCK, httpx, new_text, openai, serving

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
    for stop in (expected[0][3], [expected[0][3]], [*(f"zz{n}" for n in range(63)), expected[0][3:5]]):
        got = client.completions.create(prompt="to be", stop=stop, **ask).choices[0]
        assert got.finish_reason == "stop" and got.text == expected[0][: min(expected[0].index(stop[-1]), 3)]
    for nothing in ([], None):
        got = client.completions.create(prompt="to be", stop=nothing, best_of=1, suffix=None, logit_bias={}, **ask)
        assert got.choices[0].text == expected[0]


def test_without_a_seed_every_answer_is_another(client):
    texts = {client.completions.create(model="bard", prompt="a", temperature=2.0).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def hold_steps(monkeypatch: pytest.MonkeyPatch, free: int, seconds: float = 0.0) -> threading.Event:
    """Steps that take so long, and after `free` of them wait for the event: else all may be there before the first is sent."""
    step, steps, sent = Scheduler.step, itertools.count(), threading.Event()

    def held(*args):
        time.sleep(seconds)
        if next(steps) >= free:
            assert sent.wait(60)
        return step(*args)

    monkeypatch.setattr(Scheduler, "step", held)
    return sent


def test_streams_join_to_the_whole(client, model, tokenizer, monkeypatch):
    ask = {"model": "bard", "prompt": ["to be", "or"], "n": 2, "max_tokens": 12, "seed": 2, "temperature": 1.5}
    whole = client.completions.create(**ask)
    texts, reasons, sent, usage = [""] * 4, [None] * 4, 0, None
    all_began = hold_steps(monkeypatch, 4)
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            sent += 1
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        if all(texts):
            all_began.set()
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert texts == [choice.text for choice in whole.choices] and sent >= 8 and usage.completion_tokens == 48
    assert reasons == [choice.finish_reason for choice in whole.choices] == ["length"] * 4
    options = {"max_new_tokens": 12, "seed": 2, "temperature": 1.5, "num_return_sequences": 2}
    assert texts == new_text(model, tokenizer, "to be", **options) + new_text(model, tokenizer, "or", **options)


def test_what_comes_in_a_short_time_is_sent_together(model, tokenizer, monkeypatch):
    sent = hold_steps(monkeypatch, 20, seconds=0.01)
    app = create_app(model, tokenizer, "bard", Limits(max_events=10))
    ask = {"model": "bard", "prompt": "to be", "max_tokens": 40, "seed": 2, "logprobs": 1}
    with serving(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="x") as client:
        parts, begin = [], time.monotonic()
        for chunk in client.completions.create(**ask, stream=True):
            parts.append(chunk.choices[0])
            sent.set()
        seconds = time.monotonic() - begin
        whole = client.completions.create(**ask).choices[0]
    assert len(parts) <= 10 * seconds + 2 and len(parts) < 40 and "".join(part.text for part in parts) == whole.text
    told = [part.logprobs for part in parts if part.logprobs]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for logprobs in told for value in getattr(logprobs, name)] == getattr(whole.logprobs, name)
    assert len(told[0].tokens) < 40, "the first does not wait for the others"


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_is_not_streamed_wakes_the_loop_once(streams):
    config = GenerationConfig()
    request = Request([1], config)
    tokens = [Token(request, 0, n, None, []) for n in range(3)]

    async def follow():
        submission, got = Submission([request], streams), []

        async def collect():
            async for events in submission.events(30):
                got.append(len(events))

        collecting = asyncio.ensure_future(collect())
        for events in ([tokens[0]], tokens[1:], [request]):
            await asyncio.sleep(0.01)
            submission.send(events)
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


def test_a_prompt_that_fills_the_context_is_scored(client, model, tokenizer):
    ids = [1 + n % 30 for n in range(BLOCK)]
    ask = {"model": "bard", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    got = client.completions.create(**ask)
    assert got.choices[0].text == tokenizer.decode(ids) and got.usage.total_tokens == BLOCK
    logprobs = got.choices[0].logprobs.token_logprobs
    assert logprobs[0] is None and logprobs[1:] == pytest.approx(score(model, ids), abs=1e-3)
    with pytest.raises(openai.BadRequestError, match=f"the prompt has {BLOCK + 1} and max_tokens is 0"):
        client.completions.create(**{**ask, "prompt": [*ids, 1]})
    with pytest.raises(openai.BadRequestError, match="holds token id 99; expected ids in"):
        client.completions.create(**{**ask, "prompt": [99]})
    with pytest.raises(openai.BadRequestError, match=f"the prompt has {BLOCK} and max_tokens is 1"):
        client.completions.create(**{**ask, "prompt": ids, "max_tokens": 1})


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": 2}, {"max_tokens": 2, "echo": False}])
def test_a_damaged_model_is_reported(tokenizer, options):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=tokenizer.vocab_size))
    model.wpe.weight.data[3] = float("nan")
    with serving(create_app(model.eval(), tokenizer, "bard")) as url:
        ask = {"model": "bard", "prompt": "to be", "echo": True, "logprobs": 2, **options}
        got = httpx.post(url + "/v1/completions", json=ask)
        assert (got.status_code, got.json()["error"]["message"]) == (500, NAN)
        assert httpx.post(url + "/v1/completions", json={**ask, "prompt": "t", "max_tokens": 1}).status_code == 200


def test_what_is_impossible_has_a_number_in_json(tokenizer):
    told = prompt_logprobs(tokenizer, [1, 2], [(-math.inf, [(3, 1.0), (4, 0.0)])], 2)
    assert told["token_logprobs"] == [None, -9999.0]
    assert list(told["top_logprobs"][1].values()) == [0.0, -9999.0]


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
    assert printable_token(tokenizer, hugs[0]) == r"bytes:\xf0\x9f"


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
@pytest.mark.parametrize(("max_events", "together"), [(1e9, {1}), (1.0, {1, 4})])
def test_tokens_that_are_sent_together_are_made_together(model, tokenizer, monkeypatch, max_events, together):
    """As many at once as go into a part of a stream; each request that comes cuts what runs short."""
    steps, interrupts, decode = [], [], EngineRunner.decode_steps

    def watched(self, slots, logits, max_tokens, *args):
        steps.append(max_tokens)
        return decode(self, slots, logits, max_tokens, *args)

    monkeypatch.setattr(EngineRunner, "decode_steps", watched)
    monkeypatch.setattr(EngineRunner, "interrupt", lambda self: interrupts.append(self))
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
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist; this server has 'bard'"):
        client.models.retrieve("other")
    error = httpx.get(url + "/nowhere").json()["error"]
    assert (error["type"], error["code"]) == ("not_found_error", "unknown_url")
    assert error["message"].startswith(
        "GET /nowhere does not exist; expected POST /v1/completions, POST /v1/chat/completions"
    )
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
        ({"model": "other", "prompt": "a"}, 404, "model", "the model 'other' does not exist"),
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
        ({"model": "bard", "prompt": "a", "n": 5}, 400, "n", "n is 5; this server generates up to 4 texts at a time"),
        ({"model": "bard", "prompt": ["a"] * 4, "n": 2}, 400, "prompt", "4 prompts, n=2; this server accepts up to 7"),
        (
            {"model": "bard", "prompt": [[1]] * 2000},
            400,
            "prompt",
            "2000 prompts, n=1; this server accepts up to 7 texts",
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
            "max_token: this server has no such field; did you mean max_tokens?",
        ),
        ({"model": "bard", "prompt": "a", "stop": [""]}, 400, "stop", "expected 1 to 64 texts that are not empty"),
        ({"model": "bard", "prompt": "a", "stop": ""}, 400, "stop", "stop is ''; expected 1 to 64 texts"),
        ({"model": "bard", "prompt": "a", "stop": ["a"] * 65}, 400, "stop", "expected 1 to 64 texts"),
        ({"model": "bard", "prompt": "a", "stop": [1]}, 400, "stop", "stop: expected a text, or a list of up to 64"),
        ({"model": "bard", "prompt": "a", "stream_options": {}}, 400, "stream_options", "without stream=true"),
        (
            {"model": "bard", "prompt": "a", "stream": True, "stream_options": {"include_usages": True}},
            *(400, "stream_options", "stream_options.include_usages: this server has no such field; leave it out"),
        ),
        (
            {"model": "bard", "prompt": "a", "stream": True, "stream_options": {"x": 1}},
            *(400, "stream_options", "stream_options.x: this server has no such field; leave it out"),
        ),
        ({"model": "bard", "prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "holds 'x'; expected token ids"),
        ({"model": "bard", "prompt": "a", "logit_bias": {"1_0": 1}}, 400, "logit_bias", "holds '1_0'; expected token"),
        ({"model": "bard", "prompt": "a", "logit_bias": {"٣": 1}}, 400, "logit_bias", "expected token ids as keys"),
        (
            b'{"model": "bard", "prompt": "a", "logit_bias": {"1": NaN}}',
            400,
            "logit_bias",
            "logit_bias.1: Input should be",
        ),
        (
            {"model": "bard", "prompt": "a", "logit_bias": {"1": 101}},
            400,
            "logit_bias",
            "logit_bias.1: Input should be",
        ),
        (
            {"model": "bard", "prompt": "a", "repetition_penalty": 1e300},
            400,
            "repetition_penalty",
            "less than or equal",
        ),
        (
            {"model": "bard", "prompt": "a", "top_k": 2**63},
            400,
            None,
            r"top_k is 9223372036854775808; expected at most 9223372036854775807",
        ),
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
        ({"model": "bard", "prompt": []}, 400, "prompt", "prompt is empty"),
        ({"model": "bard", "prompt": [[1], []]}, 400, None, "prompt is empty"),
        ({"model": "bard", "prompt": [99]}, 400, None, r"prompt holds token id 99; expected ids in \[0, 35\)"),
        ({"model": "bard", "prompt": [True]}, 400, "prompt", "prompt: expected a text, token ids"),
        (
            {"model": "bard", "prompt": "a" * 48},
            400,
            "prompt",
            "is 48 tokens; the prompt has 48 and max_tokens is 1",
        ),
        (
            {"model": "bard", "prompt": "a" * 19_000},
            400,
            "prompt",
            "the prompt has 19000 and max_tokens is 1",
        ),
        (
            {"model": "bard", "prompt": "a", "max_tokens": 48},
            *(400, "max_tokens", "the context of this model is 48 tokens; the prompt has 1 and max_tokens is 48"),
        ),
        ({"model": "bard", "prompt": "a", "max_tokens": 10**30}, 400, "max_tokens", "max_tokens"),
        ({"model": "bard", "prompt": "a" * 30_000}, 413, None, "the body has 300.. bytes, more than 20000; send less"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, (dict, bytes)) else "",
)
def test_bad_bodies_get_errors_in_openais_format(url, body, status, param, match):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(url + "/v1/completions", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert re.search(match, error["message"]), error
    assert status == 413 or error["param"] is None or error["param"].startswith(param or "-"), error
    assert param is None or error["param"] is not None


def test_a_body_without_a_length_is_limited_too(url):
    answer = httpx.post(url + "/v1/completions", content=(b"x" * 1000 for _ in range(40)))
    assert answer.status_code == 413 and "the body has more than 20000 bytes" in answer.json()["error"]["message"]


def test_errors_quote_no_more_than_the_ends_of_a_long_value(url):
    for body in ({"model": "b" * 9000, "prompt": "a"}, {"model": "bard", "prompt": "a", "stop": ["a" * 130] * 65}):
        message = httpx.post(url + "/v1/completions", json=body).json()["error"]["message"]
        assert 500 < len(message) < 1010 and re.search("does not exist; this server has 'bard'$|not empty$", message)


def test_the_client_raises_bad_request(client):
    with pytest.raises(openai.BadRequestError, match="the prompt has 10 and max_tokens is 50") as error:
        client.completions.create(model="bard", prompt="to be or n", max_tokens=50)
    assert error.value.code == "context_length_exceeded"


def test_a_wrong_method_lists_what_there_is(url):
    answer = httpx.get(url + "/v1/completions")
    assert answer.status_code == 405
    assert "GET /v1/completions does not exist; expected POST /v1/completions" in answer.text
