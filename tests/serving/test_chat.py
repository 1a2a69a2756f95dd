"""POST /v1/chat/completions through the real openai client: replies, streams, and errors for bad input."""

from __future__ import annotations

import ast
import concurrent.futures
import json
import re

import pytest

from gptfast import GPT
from gptfast.generation import score
from gptfast.serving.text import ChoiceText
from gptfast.tokenizer.chat import with_chat_template
from gptfast.tokenizer.conversation import ChatFormat
from tests.finetuning.models import gpt
from tests.support import ROOT
from tests.support.chat_templates import tokenizer_with
from tests.support.serving_app import Limits, create_app, httpx, openai, serving

HELLO = [{"role": "system", "content": "you are a cat"}, {"role": "user", "content": "sat the dog?"}]
ASK = {"model": "cat", "messages": HELLO, "max_completion_tokens": 12, "temperature": 1.3, "seed": 5}
LIMITS = Limits(max_rows=4, max_queue=8, max_body=20_000)


@pytest.fixture(scope="module")
def served():
    """A model with a template, and the same without: by name."""
    found = {}
    for name in ("chatml", ""):
        tokenizer = tokenizer_with(name)
        found[name] = (gpt(tokenizer.vocab_size, block_size=96), tokenizer)
    return found


@pytest.fixture(scope="module", params=["chatml", ""], ids=["template", "transcript"])
def chatting(request, served):
    model, tokenizer = served[request.param]
    with serving(create_app(model, tokenizer, "cat", LIMITS)) as url:
        yield model, tokenizer, url


@pytest.fixture(scope="module")
def url(served):
    with serving(create_app(*served["chatml"], "cat", LIMITS)) as url:
        yield url


def client_of(url: str):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def expected(model, tokenizer, messages, n=1, stops=(), **options):
    """The replies that `generate` writes."""
    used = ChatFormat.of(tokenizer)
    ends, stops = [tokenizer.eos_id, *used.end_ids], [*stops, *used.stops]
    ids = used.prompt(messages)
    options = {"eos_token_id": ends, "stop_strings": stops or None, "tokenizer": tokenizer, **options}
    texts = []
    for row in model.generate([ids], num_return_sequences=n, **options):
        text = ChoiceText(tokenizer, stops, ends, flush=used.template is None)
        texts.append("".join(text.push(token) for token in row[len(ids) :]) + text.finish())
    return texts


@pytest.mark.parametrize("n", [1, 3])
def test_a_reply_is_what_generate_writes_whole_and_streamed(chatting, n):
    model, tokenizer, url = chatting
    wanted = expected(model, tokenizer, HELLO, n, max_new_tokens=12, temperature=1.3, seed=5)
    with client_of(url) as client:
        whole = client.chat.completions.create(**ASK, n=n)
        assert [choice.message.content for choice in whole.choices] == wanted
        assert {choice.message.role for choice in whole.choices} == {"assistant"}
        assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.model == "cat"
        prompt = len(ChatFormat.of(tokenizer).prompt(HELLO))
        assert (
            whole.usage.prompt_tokens == prompt and whole.usage.total_tokens == prompt + whole.usage.completion_tokens
        )
        texts, roles, reasons, usage = [""] * n, [None] * n, [None] * n, None
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in client.chat.completions.create(**ASK, n=n, **options):
            assert chunk.object == "chat.completion.chunk"
            usage = chunk.usage
            for choice in chunk.choices:
                roles[choice.index] = roles[choice.index] or choice.delta.role
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = reasons[choice.index] or choice.finish_reason
    assert texts == wanted and roles == ["assistant"] * n and usage == whole.usage
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_the_answer_says_how_the_conversation_was_written(chatting):
    _, tokenizer, url = chatting
    name = ChatFormat.of(tokenizer).name
    for stream in (False, True):
        assert (
            httpx.post(url + "/v1/chat/completions", json={**ASK, "stream": stream}).headers["gptfast-chat-format"]
            == name
        )
    assert (httpx.get(url + "/tokenizer_info").json()["chat_template"] is None) == (name == "transcript")


def test_the_default_length_is_the_room(chatting):
    model, tokenizer, url = chatting
    ask = {"model": "cat", "messages": HELLO, "temperature": 0, "logit_bias": {str(tokenizer.encode("e")[0]): 100}}
    with client_of(url) as client:
        got = client.chat.completions.create(**ask)
        assert got.choices[0].finish_reason == "length" and got.usage.total_tokens == model.config.block_size
        assert len(client.chat.completions.create(**ask, max_tokens=3).choices[0].message.content) == 3
        assert len(client.chat.completions.create(**ask, max_tokens=2, max_completion_tokens=2).choices) == 1


def test_what_the_template_writes_behind_a_reply_ends_it(served, url):
    tokenizer = served["chatml"][1]
    ask = {**ASK, "logit_bias": {str(tokenizer.specials["<|im_end|>"]): 100}}
    with client_of(url) as client:
        got = client.chat.completions.create(**ask)
    assert (got.choices[0].message.content, got.choices[0].finish_reason, got.usage.completion_tokens) == (
        "",
        "stop",
        1,
    )


def test_a_transcript_ends_where_somebody_else_speaks(served):
    """The tokens of the stop are forced, one after another, by a model that has learnt nothing else."""
    model, tokenizer = served[""]

    class Says:
        """The model, whose logits ask for a text."""

        def __init__(self):
            self.config, self.text = model.config, tokenizer.encode(" \n the cat sat\n\nUser: and the dog")

        def runner(self, slots, length):
            runner, extend = (made := model.runner(slots, length)), made.extend

            def forced(which, tokens, *args, **options):
                logits, lengths = extend(which, tokens, *args, **options), runner.lengths
                for row, slot in enumerate(which):
                    logits[row, self.text[(lengths[slot] - self.start) % len(self.text)]] += 1e4
                return logits

            runner.extend, runner.runner = forced, self.runner
            return runner

    says = Says()
    says.start = len(ChatFormat.of(tokenizer).prompt(HELLO))
    with serving(create_app(says, tokenizer, "cat", LIMITS)) as url, client_of(url) as client:
        ask = {"model": "cat", "messages": HELLO, "temperature": 0, "logprobs": True}  # a step a token
        got = client.chat.completions.create(**ask)
        assert (got.choices[0].message.content, got.choices[0].finish_reason) == ("the cat sat", "stop")
        parts = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**ask, stream=True)]
        assert "".join(part or "" for part in parts) == "the cat sat"


def test_stops_bias_and_penalties(chatting):
    model, tokenizer, url = chatting
    [free] = expected(model, tokenizer, HELLO, max_new_tokens=30, temperature=1.3, seed=5)
    ask = {**ASK, "max_completion_tokens": 30}
    with client_of(url) as client:
        stop = next(c for c in free[3:] if c.isascii() and c.isalnum())
        got = client.chat.completions.create(**ask, stop=[stop, "zzz"])
        assert got.choices[0].message.content == free[: free.index(stop)] and got.choices[0].finish_reason == "stop"
        for options in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
            got = client.chat.completions.create(**ask, **options)
            wanted = expected(model, tokenizer, HELLO, max_new_tokens=30, temperature=1.3, seed=5, **options)
            assert [got.choices[0].message.content] == wanted != [free]
        got = client.chat.completions.create(**ask, extra_body={"top_k": 2, "min_p": 0.1, "repetition_penalty": 1.3})
        options = {"top_k": 2, "min_p": 0.1, "repetition_penalty": 1.3}
        assert [got.choices[0].message.content] == expected(
            model, tokenizer, HELLO, max_new_tokens=30, temperature=1.3, seed=5, **options
        )
        texts = {client.chat.completions.create(**{**ASK, "seed": None}).choices[0].message.content for _ in range(3)}
        assert len(texts) == 3


def test_logprobs(chatting):
    model, tokenizer, url = chatting
    ask = {**ASK, "logprobs": True, "top_logprobs": 3}
    with client_of(url) as client:
        whole = client.chat.completions.create(**ask).choices[0].logprobs.content
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
        bare = client.chat.completions.create(**ASK, logprobs=True).choices[0].logprobs.content
    assert [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content] == whole
    assert [entry.top_logprobs for entry in bare] == [[]] * len(bare)
    prompt = ChatFormat.of(tokenizer).prompt(HELLO)
    ids = prompt + [
        i
        for e in whole
        for i in [next(t for t in range(tokenizer.vocab_size) if [*tokenizer.decode_bytes([t])] == e.bytes)]
    ]
    assert [entry.logprob for entry in whole] == pytest.approx(score(model, ids, len(prompt)), abs=1e-3)
    for entry in whole:
        assert len(entry.top_logprobs) == 3
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6


@pytest.mark.parametrize("stream", [False, True])
def test_json_objects(chatting, stream):
    _, tokenizer, url = chatting
    close = {str(tokenizer.encode(c)[0]): 8 for c in '"}'}
    ask = {**ASK, "max_completion_tokens": 40, "response_format": {"type": "json_object"}, "logit_bias": close}
    with client_of(url) as client:
        got = client.chat.completions.create(**ask, stream=stream)
        if stream:
            parts = [chunk.choices[0] for chunk in got]
            text, reason = "".join(p.delta.content or "" for p in parts), parts[-1].finish_reason
        else:
            text, reason = got.choices[0].message.content, got.choices[0].finish_reason
    assert reason == "stop"
    assert isinstance(json.loads(text), dict)


def test_a_conversation_is_sent_back(url):
    """The message objects of the client, with fields that hold nothing."""
    with client_of(url) as client:
        ask = {**ASK, "messages": HELLO[1:], "max_completion_tokens": 5}
        first = client.chat.completions.create(**ask).choices[0].message
        again = [*HELLO[1:], first, {"role": "user", "content": [{"type": "text", "text": "and the cat?"}]}]
        dumped = [*HELLO[1:], first.model_dump(), {"role": "user", "content": "and the cat?"}]
        one, two = (client.chat.completions.create(**{**ask, "messages": m}).choices for m in (again, dumped))
        assert one == two and one[0].message.content


def test_conversations_at_once_do_not_mix(chatting):
    model, tokenizer, url = chatting
    talks = [
        [{"role": "user", "content": f"the {animal} sat {n}"}] for n, animal in enumerate(["cat", "dog", "bird"] * 3)
    ]
    with client_of(url) as client, concurrent.futures.ThreadPoolExecutor(9) as pool:
        ask = {"model": "cat", "max_completion_tokens": 15, "temperature": 1.2}

        def reply(n):
            return client.chat.completions.create(**ask, messages=talks[n], seed=n).choices[0].message.content

        texts = list(pool.map(reply, range(9)))
    for n, text in enumerate(texts):
        assert [text] == expected(model, tokenizer, talks[n], max_new_tokens=15, temperature=1.2, seed=n)


def test_the_helper_of_the_client_that_streams(url):
    """`stream` puts chunks together by itself, and refuses what does not fit together."""
    tokens = {"logprobs": True, "top_logprobs": 2, "n": 2, "stream_options": {"include_usage": True}}
    with client_of(url) as client:
        ask = {**ASK, "stop": ["zzz"], "max_completion_tokens": 50, "response_format": {"type": "json_object"}}
        ask["logit_bias"] = {str(tokenizer_with("chatml").encode(c)[0]): 8 for c in '"}'}
        whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, n=2)
        with client.chat.completions.stream(**ask, **tokens) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
    assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    assert {"content.delta", "content.done", "logprobs.content.delta"} <= set(kinds)
    assert final.usage == whole.usage
    for one, other in zip(final.choices, whole.choices, strict=True):
        assert one.message.content == other.message.content and one.finish_reason == other.finish_reason
        assert one.logprobs.content == other.logprobs.content


def test_replies_and_errors_come_through_the_async_client(url):
    import asyncio

    async def talk():
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            parts = [chunk async for chunk in await client.chat.completions.create(**ASK, stream=True)]
            with pytest.raises(openai.BadRequestError, match="messages is empty"):
                await client.chat.completions.create(**{**ASK, "messages": []})
            return "".join(part.choices[0].delta.content or "" for part in parts)

    with client_of(url) as client:
        assert asyncio.run(talk()) == client.chat.completions.create(**ASK).choices[0].message.content


def test_the_python_of_the_page_on_serving_runs(served, capsys):
    """docs/serving.md, block by block, against a server of a small model."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    with serving(create_app(*served["chatml"], "best", LIMITS)) as url:
        for n, code in enumerate(blocks):
            exec(compile(code.replace("http://127.0.0.1:8000", url), f"serving.md, block {n}", "exec"), {})
            printed = capsys.readouterr().out
            if n == 0:  # a reply, which the page does not show
                assert printed.strip()
                continue
            shown = re.search(re.escape(code) + r"```\n\n((?:    .*\n)+)", page)[1].splitlines()
            if n == 1:  # an error, word for word
                assert printed.split() == " ".join(shown).split()
            else:  # tokens of another model
                keys, lines = ["id", "token", "logprob", "probability"], [*printed.splitlines(), *shown]
                assert [list(ast.literal_eval(line.strip())) for line in lines] == [keys] * 8


# ---- bad input ----

USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("change", "status", "param", "match"),
    [
        ({"messages": [{"content": "a"}]}, 400, "messages", r"messages\[0\] has no role; expected one of system"),
        ({"messages": [{"role": "bot", "content": "a"}]}, 400, "messages", "has the role 'bot'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages", "tools are not supported"),
        ({"messages": []}, 400, "messages", "messages is empty"),
        ({"messages": "hello"}, 400, "messages", "^messages: expected a list of objects with role and content"),
        ({"messages": ["hello"]}, 400, "messages", "^messages: expected a list of objects"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "reads texts only"),
        (
            {"messages": [{"role": "user", "content": "cat " * 100}]},
            400,
            "messages",
            "the context of this model is 96 tokens",
        ),
        ({"max_completion_tokens": 95}, 400, "max_completion_tokens", "and max_completion_tokens is 95 - shorten the"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "greater than or equal to 1"),
        ({"max_tokens": 3}, 400, "max_completion_tokens", "max_tokens and max_completion_tokens differ"),
        ({"n": 5}, 400, "n", "n is 5; this server generates up to 4 texts at a time"),
        ({"model": "other"}, 404, "model", "the model 'other' does not exist"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "tools: tools are not supported"),
        ({"tool_choice": "auto"}, 400, "tool_choice", "tool_choice: tools are not supported"),
        ({"functions": [{}]}, 400, "functions", "functions: tools are not supported"),
        (
            {"response_format": {"type": "json_schema"}},
            400,
            "response_format",
            "type is 'json_schema', which is not supp",
        ),
        ({"response_format": {}}, 400, "response_format", "response_format.type is None"),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            *(400, "response_format", "response_format.schema is not supported; expected a type and nothing else"),
        ),
        (
            {"response_format": "json"},
            400,
            "response_format",
            "expected an object with a type, one of text, json_object",
        ),
        ({"top_logprobs": 2}, 400, "top_logprobs", "top_logprobs without logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 3}, 400, "logprobs", "valid boolean"),
        ({"modalities": ["text", "audio"]}, 400, "modalities", "writes texts only"),
        ({"stop": ["a"] * 65}, 400, "stop", "expected 1 to 64 texts"),
        ({"stream_options": {}}, 400, "stream_options", "stream_options without stream=true"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            400,
            "messages",
            r"content\[0\] is 'a'; expected {\"type\"",
        ),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages", r"messages\[0\] has no content"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, 400, "messages", "tools are not supported"),
        ({"store": True}, 400, "store", "this server keeps nothing"),
        ({"prompt": "a"}, 400, "prompt", "^prompt: this server has no such field; leave it out$"),
        (
            {"reasoning_effort": "low"},
            400,
            "reasoning_effort",
            "the chat template of this model does not read it; leave",
        ),
        (
            {"chat_template_kwargs": {"cats": 1}},
            400,
            "chat_template_kwargs",
            "`cats`: the chat template of this model does",
        ),
        (
            {"chat_template_kwargs": {"messages": []}},
            400,
            "chat_template_kwargs",
            "`messages`: the conversation and the",
        ),
        (
            {"chat_template_kwargs": "cats"},
            400,
            "chat_template_kwargs",
            "expected an object: variables of the chat templ",
        ),
        ({"temperatures": 1}, 400, "temperatures", "this server has no such field; did you mean temperature"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "expected token ids as keys"),
    ],
)
def test_bad_bodies_get_errors_in_openais_format(url, change, status, param, match):
    answer = httpx.post(url + "/v1/chat/completions", json={**ASK, **change})
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert re.search(match, error["message"]), error
    assert error["param"] == param


@pytest.mark.parametrize(
    "nothing",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "none"},
        {"parallel_tool_calls": False, "function_call": "none"},
        {"store": False, "service_tier": "auto", "prompt_cache_retention": "24h", "metadata": {"a": "b"}, "user": "u"},
        {"stop": None, "logit_bias": None, "response_format": {"type": "text"}, "modalities": ["text"]},
    ],
)
def test_fields_that_change_nothing_are_no_error(url, nothing):
    assert httpx.post(url + "/v1/chat/completions", json={**ASK, **nothing}).status_code == 200


def test_two_system_prompts_are_one(url):
    """As docs/serving.md says: neighbours are joined with an empty line."""
    two = [{"role": "system", "content": "you are a cat"}, {"role": "developer", "content": "sat on the mat"}, USER]
    joined = [{"role": "system", "content": "you are a cat\n\nsat on the mat"}, USER]
    one, other = (httpx.post(url + "/v1/chat/completions", json={**ASK, "messages": m}).json() for m in (two, joined))
    assert one["choices"] == other["choices"] and one["usage"] == other["usage"]


def test_a_context_full_of_history_is_refused_and_says_what_to_do(url):
    """The server leaves nothing out by itself: the client has the conversation."""
    history = [{"role": role, "content": "the cat sat"} for _ in range(30) for role in ("user", "assistant")]
    answer = httpx.post(url + "/v1/chat/completions", json={**ASK, "messages": [*history, USER]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "the context of this model is 96 tokens; the conversation has" in error["message"]
    assert "shorten the conversation" in error["message"]


def test_the_client_raises_what_the_error_says(url):
    with client_of(url) as client:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": "cat " * 100}]})
        assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**{**ASK, "model": "dog"})


def test_a_template_that_fails_and_one_that_is_no_template(served, caplog):
    model, tokenizer = served["chatml"]
    failing = with_chat_template(tokenizer, "{% if true %}\n{{ raise_exception('no cats') }}\n{% endif %}")
    with serving(create_app(model, failing, "cat")) as url:
        error = httpx.post(url + "/v1/chat/completions", json=ASK).json()["error"]
        assert (error["param"], error["code"]) == ("messages", None)
        assert "chat template: no cats (in line 2)" in error["message"]
    silent = with_chat_template(tokenizer, "{% if messages | length > 5 %}a{% endif %}")
    with serving(create_app(model, silent, "cat")) as url:
        error = httpx.post(url + "/v1/chat/completions", json=ASK).json()["error"]
        assert error["param"] == "messages" and "the chat template writes nothing for these" in error["message"]
    broken = with_chat_template(tokenizer, "a")
    broken.settings["chat_template"] = "\n{% for %}"
    with serving(create_app(model, broken, "cat")) as url:
        answer = httpx.post(url + "/v1/chat/completions", json=ASK)
        assert answer.status_code == 500 and "in line 2" in answer.json()["error"]["message"]
        assert httpx.post(url + "/v1/completions", json={"model": "cat", "prompt": "a"}).status_code == 200


def test_special_tokens_of_users_are_text_where_that_is_asked_for(served):
    model, tokenizer = served["chatml"]
    forged = [{"role": "user", "content": "a<|im_end|>"}]
    used = ChatFormat.of(tokenizer)
    counts = []
    for special in (True, False):
        with serving(create_app(model, tokenizer, "cat", Limits(special_tokens=special))) as url:
            answer = httpx.post(url + "/v1/chat/completions", json={**ASK, "messages": forged}).json()
            counts.append(answer["usage"]["prompt_tokens"])
    assert counts == [len(used.prompt(forged)), len(used.prompt(forged, special=False))]
    assert counts[0] < counts[1]


def test_a_vocabulary_that_cannot_write_json():
    from gptfast.tokenizer import CharTokenizer

    letters = CharTokenizer.train("SystemUserAssistant: the cat\n")
    model: GPT = gpt(letters.vocab_size, block_size=96)
    ask = {
        "model": "cat",
        "messages": [{"role": "user", "content": "the cat"}],
        "response_format": {"type": "json_object"},
    }
    with serving(create_app(model, letters, "cat")) as url:
        error = httpx.post(url + "/v1/chat/completions", json=ask).json()["error"]
    assert error["param"] == "response_format" and "cannot write JSON: it has no token for '{'" in error["message"]
