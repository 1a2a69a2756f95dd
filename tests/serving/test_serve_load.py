"""gptfast serve under load: the queue, clients that leave, steps that fail, a server that stops, prompts that are
scored."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import torch

from gptfast.backend import has_cpu_ops
from gptfast.generation import score
from gptfast.generation.scoring import score_in_pieces
from gptfast.serving.app import Limits, create_app
from gptfast.tokenizer import CharTokenizer
from tests.support import ROOT
from tests.support.serving_app import ASK, Gated, httpx, new_text, openai, serving, wait_until


def test_more_than_the_queue_holds_is_429_until_there_is_room(url, app, closed, client):
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(httpx.post, url + "/v1/completions", json=ASK, timeout=30) for _ in range(7)]
        wait_until(lambda: app.state.worker.open_sequences == 7)
        with pytest.raises(openai.RateLimitError, match="too many requests are running and waiting; try again later"):
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
    assert scheduler.runner.lengths == [0] * 4


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


LONG = {"model": "bard", "prompt": "to be", "max_tokens": 0, "echo": True, "logprobs": 1}
READINGS = {
    "echo": ("/v1/completions", {**LONG, "prompt": ["a" * 40] * 3}),
    "echo, then a stream": ("/v1/completions", {**LONG, "prompt": ["a" * 40] * 3, "max_tokens": 5, "stream": True}),
    "next_tokens": ("/next_tokens", {"model": "bard", "prompt": "a" * 40}),
    "beam_tree": ("/beam_tree", {"model": "bard", "prompt": "to be", "steps": 10}),
}


@pytest.mark.parametrize(("path", "body"), READINGS.values(), ids=READINGS)
def test_what_a_client_that_leaves_has_asked_to_read_is_read_no_further(
    url, app, gated, closed, monkeypatch, path, body
):
    """At the gate each waits in its first piece; behind it no other piece begins."""
    monkeypatch.setattr("gptfast.generation.scoring.PIECE", 5)
    monkeypatch.setattr("gptfast.generation.next_tokens.PIECE", 5)
    before = gated.steps
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + path, json=body, timeout=httpx.Timeout(10, read=0.3))
    wait_until(lambda: app.state.worker.open_sequences == 0)
    closed.set()
    assert httpx.post(url + "/v1/completions", json={**ASK, "max_tokens": 1}, timeout=10).status_code == 200
    assert gated.steps - before == 2, "one piece, and the token asked for behind it"


def test_requests_that_take_too_long_are_cancelled(model, tokenizer):
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


def test_a_step_that_fails_is_500_and_the_server_continues(url, app, gated, client, model, tokenizer):
    gated.failure = MemoryError("no memory")
    with pytest.raises(openai.InternalServerError, match="no memory"):
        client.completions.create(**ASK)
    gated.failure = RuntimeError("a broken step")
    with pytest.raises(openai.APIError, match="a broken step"):
        list(client.completions.create(**ASK, stream=True))
    got = client.completions.create(**ASK, seed=1)
    assert [got.choices[0].text] == new_text(model, tokenizer, "to be", max_new_tokens=40, seed=1)
    assert app.state.worker.open_sequences == 0


def test_one_request_without_a_token_left_fails_alone(client, tokenizer, monkeypatch):
    """No request that is let in comes to that: its biases are made worse here."""
    banned = dict.fromkeys(range(tokenizer.vocab_size), float("-inf"))
    monkeypatch.setattr("gptfast.serving.protocol.Completion._bias", lambda self: banned if self.logit_bias else None)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        good = pool.submit(client.completions.create, **ASK)
        with pytest.raises(openai.InternalServerError, match="no token is left to choose"):
            client.completions.create(**ASK, logit_bias={"1": -100})
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
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/soak_server.py"), "--requests", "200"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_streams_get_an_error_when_the_server_stops(model, tokenizer):
    """A stream that ends within the grace period is whole; others, and scorings, get an error."""
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
        monkeypatch.setattr("gptfast.generation.scoring.PIECE", piece)
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


def test_generation_continues_between_the_pieces_of_a_scoring(app, closed, url, monkeypatch):
    made = []

    def watched(*args, **options):
        pieces = score_in_pieces(*args, **options)
        while True:
            made.append([row.num_new for request in app.state.worker.scheduler._running for row in request.sequences])
            try:
                next(pieces)
            except StopIteration as end:
                return end.value
            yield

    monkeypatch.setattr("gptfast.serving.completions.score_in_pieces", watched)
    monkeypatch.setattr("gptfast.generation.scoring.PIECE", 1)
    scoring = {**ASK, "prompt": "a" * 20, "max_tokens": 0, "echo": True, "logprobs": 1}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = []
        for body in (ASK, scoring):
            asked.append(pool.submit(httpx.post, url + "/v1/completions", json=body, timeout=20))
            wait_until(lambda: app.state.worker.open_sequences == len(asked))
        closed.set()
        assert [answer.result().status_code for answer in asked] == [200] * 2
    lengths = [tokens for text in made for tokens in text]  # of the text, before each piece, until it has ended
    assert len(made) == 20 and len(lengths) > 5
    assert all(1 <= b - a <= 4 for a, b in pairwise(lengths)), "a step between two pieces"


def test_scorings_are_counted_and_limited(url, app, closed, client):
    ask = {"model": "bard", "prompt": "to be", "max_tokens": 0, "echo": True, "logprobs": 1}
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(httpx.post, url + "/v1/completions", json=ask, timeout=30) for _ in range(7)]
        wait_until(lambda: app.state.worker.open_sequences == 7)
        with pytest.raises(openai.RateLimitError, match="too many requests are running and waiting"):
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
    """It is tokenised outside the event loop, which answers other requests meanwhile."""
    gate, original = threading.Event(), CharTokenizer.encode

    def encode(self, *asked):
        gate.wait(20)
        return original(self, *asked)

    monkeypatch.setattr(CharTokenizer, "encode", encode)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, url + "/v1/completions", json={**ASK, "prompt": "a" * 18_000}, timeout=30)
        try:
            time.sleep(0.2)
            assert httpx.get(url + "/health", timeout=5).status_code == 200 and not asked.done()
        finally:
            gate.set()
        assert asked.result().json()["error"]["code"] == "context_length_exceeded"
