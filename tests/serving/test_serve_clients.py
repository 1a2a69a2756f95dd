"""gptfast serve and its clients: those that wait, leave, or are too many; and answers to raw HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
import uvicorn

from gptfast.serving.app import Limits, create_app
from gptfast.serving.connections import IDLE_SECONDS, Connections, choose_connections, most_connections
from gptfast.serving.server import GracefulServer, bind
from tests.support.command import save_model
from tests.support.serving_app import ASK, BLOCK, Gated, httpx, serving, wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
HALVES = {
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHos",
    "half a body": HEAD % 100 + b"{",
    "no body": HEAD % 100,
    "chunks": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
}


def connect(url, data=b""):
    parts = urlsplit(url)
    client = socket.create_connection((parts.hostname, parts.port), timeout=20)
    client.sendall(data)
    return client


def answer(client):
    """Status and error of an answer, read to its end."""
    with client:
        got = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def whole(ask=ASK):
    body = json.dumps(ask).encode()
    return HEAD % len(body) + body


# ---- too many ----


def test_half_sent_requests_shut_nobody_out(model, tokenizer):
    with serving(create_app(model, tokenizer, "bard", Limits(max_connections=8))) as url:
        clients = [connect(url, half) for _ in range(10) for half in HALVES.values()]
        for _ in range(3):
            assert httpx.get(url + "/health", timeout=10).status_code == 200
        assert httpx.post(url + "/v1/completions", json=ASK, timeout=10).status_code == 200
        for client in clients[:32]:
            status, error = answer(client)
            assert status == 503 and set(error) == {"message", "type", "param", "code"}
            assert error["message"] == "8 connections, the limit, and this one has sent no whole request"
        [client.close() for client in clients]


@pytest.mark.slow
def test_more_half_sent_requests_than_there_may_be_files(tmp_path, tokenizer):
    """Of the command as it is: no option, and few open files."""
    save_model(tmp_path / "bard", tokenizer, BLOCK)
    code = "import resource as r, sys; r.setrlimit(r.RLIMIT_NOFILE, (512, 512)); from gptfast.cli import main; main()"
    args = [sys.executable, "-c", code, "serve", "--model", str(tmp_path / "bard"), "--port", "0"]
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as process, contextlib.ExitStack() as clients:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"running on (http://\S+)", line)))
        process.send_signal(signal.SIGSTOP)  # so that all are there at once
        for n in range(700):
            clients.enter_context(connect(url, list(HALVES.values())[n % len(HALVES)]))
        process.send_signal(signal.SIGCONT)
        for _ in range(3):
            assert httpx.get(url + "/health", timeout=10).json()["status"] == "ok"
        process.terminate()
        begin = time.monotonic()
        log = process.stderr.read()
        assert time.monotonic() - begin < 8, "half a request keeps no server up"
    assert "clients rejected: there are 358 connections, the limit" in log and "Traceback" not in log


def test_where_all_wait_for_texts_one_more_is_refused(model, tokenizer):
    gated = Gated(model)
    app = create_app(gated, tokenizer, "bard", Limits(max_connections=3))
    with serving(app) as url:
        gated.gate.clear()
        asking = [connect(url, whole()) for _ in range(3)]
        wait_until(lambda: app.state.worker.open_sequences == 3)
        status, error = answer(connect(url, whole()))
        assert (status, error["code"]) == (503, "busy") and "3 connections wait for texts" in error["message"]
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            httpx.get(url + "/health").raise_for_status()
        gated.gate.set()
        for client in asking:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            client.close()
        wait_until(lambda: httpx.get(url + "/health").status_code == 200)


def test_an_idle_connection_makes_room_without_a_word(model, tokenizer):
    with serving(create_app(model, tokenizer, "bard", Limits(max_connections=1))) as url:
        idle, got = connect(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"), b""
        while not got.endswith(b"}"):
            got += idle.recv(4096)
        assert httpx.get(url + "/health").status_code == 200
        assert idle.recv(4096) == b"", "nobody asked"
        idle.close()


def test_how_many_connections_there_may_be(monkeypatch):
    for files, most in ((1024, 768), (256, 153), (64, 1), (resource.RLIM_INFINITY, 838809)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections() == most
        assert choose_connections(None, 80) == min(1024, most)
    assert choose_connections(None, 1000) == 4000 and choose_connections(5, 1000) == 5


# ---- too slow ----


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_what_does_not_arrive_in_time_is_408(model, tokenizer, half):
    with serving(create_app(model, tokenizer, "bard", Limits(client_seconds=0.3))) as url:
        status, error = answer(connect(url, half))
        assert (status, error["code"]) == (408, "timeout") and "did not arrive in time" in error["message"]
        slow, begin = connect(url, half), time.monotonic()
        with pytest.raises(OSError), slow:  # noqa: PT012 (a byte at a time gives no more time)
            while time.monotonic() < begin + 10:
                slow.sendall(b" " if half.endswith(b"{") else b"1")
                time.sleep(0.05)
        assert time.monotonic() < begin + 5
        assert httpx.get(url + "/health").status_code == 200


def test_a_silent_client_is_disconnected(model, tokenizer):
    with serving(create_app(model, tokenizer, "bard", Limits(client_seconds=0.2))) as url:
        assert answer(connect(url))[0] == 408


def test_an_answer_may_take_longer_than_a_request(model, tokenizer):
    gated = Gated(model)
    with serving(create_app(gated, tokenizer, "bard", Limits(client_seconds=0.2))) as url:
        gated.gate.clear()
        with connect(url, whole()) as client:
            time.sleep(0.6)
            gated.gate.set()
            assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_the_time_of_an_answer_is_for_all_of_it(model, tokenizer):
    """Scoring each of several prompts takes a part of it."""
    app = create_app(Gated(model, delay=0.25), tokenizer, "bard", Limits(seconds=0.6))
    ask = {"model": "bard", "prompt": ["to be"] * 6, "max_tokens": 0, "echo": True, "logprobs": 0}
    with serving(app) as url:
        begin = time.monotonic()
        answer = httpx.post(url + "/v1/completions", json=ask)
        assert answer.status_code == 504 and time.monotonic() < begin + 1.4
        assert httpx.post(url + "/v1/completions", json={**ask, "prompt": "to be"}).status_code == 200


@contextlib.asynccontextmanager
async def connected(app, connections):
    """The two ends of a client's connection to a server that has these connections alone."""
    config = uvicorn.Config(
        app, http=connections, lifespan="off", log_level="critical", port=0, timeout_keep_alive=int(IDLE_SECONDS)
    )
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname(), limit=1)
    try:
        yield reader, writer
    finally:
        server.should_exit = server.force_exit = True
        writer.close()
        [task.cancel() for task in server.server_state.tasks]
        await serving


def test_an_answer_that_nobody_takes_is_cut():
    """By the connection itself: the application waits until its client takes what there is, however long that is."""
    sent = 0

    async def app(scope, receive, send):
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 1
            await asyncio.sleep(0)

    async def run():
        connections = Connections(most=4, client_seconds=30, answer_seconds=0.5)
        async with connected(app, connections) as (_, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            begin = time.monotonic()
            while not sent or len(connections):
                assert time.monotonic() < begin + 10
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_connection_stays_open_between_requests(model, tokenizer):
    """Longer than clients keep theirs: else the server may close one on which a request is under way."""
    client_seconds, used = 40, (httpx.Limits().keepalive_expiry, 15, 90, 118)  # httpx, aiohttp, Go, curl

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

    async def run():
        connections = Connections(most=4, client_seconds=client_seconds, answer_seconds=30)
        loop = asyncio.get_running_loop()

        def left():
            return [timer.when() - loop.time() for timer in connections._waiting.values()]

        async with connected(app, connections) as (reader, writer):
            while not connections:
                await asyncio.sleep(0.01)
            assert max(left()) <= client_seconds, "a new connection has the time of a request"
            for _ in range(2):
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                got = b""
                while not got.endswith(b"done"):
                    got += await asyncio.wait_for(reader.read(4096), 10)
                assert min(left()) > max(used)
            [protocol] = connections._waiting
            assert protocol.timeout_keep_alive_task.when() - loop.time() > max(used)
            writer.write(b"GET / HTTP/1.1\r\n")
            begin = loop.time()
            while max(left()) > client_seconds:
                assert loop.time() < begin + 10, "a request that has begun has its own time"
                await asyncio.sleep(0.01)

    asyncio.run(run())
    with bind("127.0.0.1", 0) as bound:
        server = GracefulServer(create_app(model, tokenizer, "bard"), bound)
        assert server.config.timeout_keep_alive > max(used)


# ---- leaving, odd HTTP, keys ----


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_a_client_that_leaves_amid_its_request_leaves_no_trace(model, tokenizer, half, caplog):
    app = create_app(model, tokenizer, "bard", Limits())
    with serving(app) as url:
        connect(url, half).close()
        for _ in range(3):
            assert httpx.get(url + "/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_requests_that_come_together_are_answered_in_turn(model, tokenizer):
    with serving(create_app(model, tokenizer, "bard", Limits(client_seconds=0.5))) as url:
        last = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with connect(
            url, whole({**ASK, "max_tokens": 3}) * 2 + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + last
        ) as client:
            got = b"".join(iter(lambda: client.recv(65536), b""))
    assert got.count(b"HTTP/1.1 200") == 4 and got.count(b'"text_completion"') == 2
    assert got.index(b'"sequences"') < got.index(b'"owned_by"')


def test_what_is_not_http_gets_an_error(model, tokenizer):
    with serving(create_app(model, tokenizer, "bard")) as url:
        for data in (b"hello\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"\x16\x03\x01" * 30 + b"\r\n\r\n"):
            status, error = answer(connect(url, data))
            assert (status, error["code"], error["type"]) == (400, "invalid_http", "invalid_request_error")


def test_the_scheme_of_a_key_is_written_in_any_case(model, tokenizer):
    with serving(create_app(model, tokenizer, "bard", api_key="sesame")) as url:
        for value, status in (
            ("Bearer sesame", 200),
            ("bearer sesame", 200),
            ("BEARER  sesame", 200),
            ("bearer Sesame", 401),
            ("Bearer", 401),
            ("bearersesame", 401),
            ("Basic sesame", 401),
            ("sesame", 401),
            ("", 401),
        ):
            got = httpx.get(url + "/v1/models", headers={"Authorization": value})
            assert got.status_code == status, value
