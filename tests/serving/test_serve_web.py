"""gptfast serve for browsers and monitors: CORS, names of the server, HEAD, and the options of streams."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gptfast.cli import app as command
from gptfast.serving.app import create_app
from gptfast.serving.hosts import hosts_of
from tests.support.serving_app import ASK, httpx, openai, serving

# ---- options of streams ----


@pytest.mark.parametrize("usage", [None, False, True])
def test_echo_alone_is_streamed(client, usage):
    ask = {"model": "bard", "prompt": ["to be", "or"], "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}
    whole = client.completions.create(**ask)
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    chunks = list(client.completions.create(**ask, **options, stream=True))
    last = chunks.pop() if usage else None
    assert [c.choices[0].model_dump() for c in chunks] == [c.model_dump() for c in whole.choices]
    assert all(c.usage is None and c.choices[0].finish_reason == "length" for c in chunks)
    if last is not None:
        assert last.choices == [] and last.usage == whole.usage and last.usage.completion_tokens == 0


def sizes(url: str, **options) -> tuple[list[int], list[dict]]:
    """Bytes of the events of a stream, and their contents."""
    body = httpx.post(url + "/v1/completions", json={**ASK, "stream": True, "seed": 1, **options}).text
    events = [event for event in body.split("\n\n") if event.startswith("data: {")]
    assert body.endswith("data: [DONE]\n\n")
    return [len(event.encode()) + 2 for event in events], [json.loads(event[6:]) for event in events]


def test_obfuscation_hides_lengths(url, client):
    bare_sizes, bare = sizes(url, stream_options={"include_obfuscation": False})
    assert not any("obfuscation" in chunk for chunk in bare) and len(set(bare_sizes)) > 1
    same_sizes, padded = sizes(url, stream_options={"include_obfuscation": True, "include_usage": True})
    assert not any(size % 256 for size in same_sizes)  # a fast machine may send many tokens at once: more than 256
    texts = ["".join(c["text"] for chunk in chunks for c in chunk["choices"]) for chunks in (bare, padded)]
    assert texts[0] == texts[1] and padded[-1]["usage"]["completion_tokens"] == ASK["max_tokens"]
    assert len({chunk["obfuscation"] for chunk in padded}) == len(padded)
    ask = {**ASK, "seed": 1, "stream": True, "stream_options": {"include_obfuscation": True}}
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**ask)) == texts[0]


# ---- HEAD, CORS ----


def test_head_where_there_is_get(url):
    for path in ("/health", "/v1/models", "/v1/models/bard"):
        got = httpx.head(url + path)
        assert (got.status_code, got.content) == (200, b"")
        assert got.headers["content-type"] == "application/json" and int(got.headers["content-length"]) > 10
    assert httpx.head(url + "/v1/models/other").status_code == 404
    assert httpx.head(url + "/v1/completions").status_code == 405


def asked_before(url: str, origin: str):
    """What a browser asks before a POST with JSON and a key."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    return httpx.options(url + "/v1/completions", headers=headers)


OWN = ["http://localhost:3000", "http://127.0.0.1:8080", "https://localhost", "http://[::1]:5173"]
STRANGE = [
    "https://example.com",
    "http://localhost.evil.com",
    "http://localhost:3000.evil.com",
    "null",
    "http://notlocalhost",
]


@pytest.mark.parametrize(
    ("origins", "let_in", "kept_out"),
    [
        ([], OWN, STRANGE),
        (["https://example.com"], [*OWN, "https://example.com"], STRANGE[1:]),
        (["*"], [*OWN, *STRANGE], []),
        (["none"], [], [*OWN, *STRANGE]),
    ],
)
def test_which_pages_may_ask(model, tokenizer, origins, let_in, kept_out):
    with serving(create_app(model, tokenizer, "bard", api_key="sesame", cors_origins=origins)) as url:
        for origin in let_in:
            before = asked_before(url, origin)
            assert before.status_code == 200, "no key can be sent before"
            assert before.headers["access-control-allow-origin"] in (origin, "*")
            assert "authorization" in before.headers["access-control-allow-headers"].lower()
            assert "POST" in before.headers["access-control-allow-methods"]
        for origin in kept_out:
            before = asked_before(url, origin)
            assert before.status_code >= 400 and "access-control-allow-origin" not in before.headers
        origin = (let_in or kept_out)[0]
        headers = {"Authorization": "Bearer sesame", "Origin": origin}
        for ask, status in ((ASK, 200), ({**ASK, "stream": True}, 200), ({"model": "bard"}, 400)):
            got = httpx.post(url + "/v1/completions", json=ask, headers=headers)
            assert got.status_code == (status if let_in else 403)
            assert (got.headers.get("access-control-allow-origin") in (origin, "*")) == bool(let_in)
        wrong = httpx.get(url + "/v1/models", headers={"Origin": origin})  # a page can read why
        assert wrong.status_code == 401 and ("access-control-allow-origin" in wrong.headers) == bool(let_in)


@pytest.mark.parametrize(
    ("origins", "said"),
    [
        (["example.com"], "`cors_origin` is 'example.com'; expected the origin of a page, such as https://example.com"),
        (["https://example.com/chat"], "expected the origin of a page"),
        (["none", "*"], "`cors_origin` has none and others; give none, or the others"),
    ],
)
def test_origins_are_checked_before_the_model_is_loaded(origins, said):
    options = [part for origin in origins for part in ("--cors-origin", origin)]
    done = CliRunner().invoke(command, ["serve", "--model", "nowhere", *options])
    assert done.exit_code == 1 and said in str(done.exception)


# ---- pages of other sites ----

OWN_HOSTS = ["localhost", "127.0.0.1:8000", "127.0.0.9", "[::1]:8000", "LOCALHOST:1", "localhost."]
STRANGE_HOSTS = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.0.2.1",
                 "0.0.0.0", "[::2]", "notlocalhost", "", "a b", "localhost:80:80", "[::1].evil.example"]  # fmt: skip


@pytest.mark.parametrize(
    ("listens", "names", "answered", "refused"),
    [
        ("127.0.0.1", [], OWN_HOSTS, STRANGE_HOSTS),
        ("::1", [], OWN_HOSTS, STRANGE_HOSTS),
        ("localhost", ["gpu.example.org"], [*OWN_HOSTS, "GPU.example.org:443"], [*STRANGE_HOSTS, "a.gpu.example.org"]),
        ("127.0.0.1", ["*.example.org", "192.0.2.1"], ["a.example.org", "a.b.example.org:1", "192.0.2.1:80"],
         ["example.org", "anexample.org", "evil.example", "192.0.2.2"]),
        ("127.0.0.1", ["[2001:DB8:0:0::1]"], ["[2001:db8::1]:80", *OWN_HOSTS], ["[2001:db8::2]"]),
        ("127.0.0.1", ["*"], [*OWN_HOSTS, *STRANGE_HOSTS], []),
        ("0.0.0.0", [], [*OWN_HOSTS, *STRANGE_HOSTS], []),
        ("192.0.2.7", [], [*OWN_HOSTS, *STRANGE_HOSTS], []),
        ("0.0.0.0", ["gpu.example.org"], [*OWN_HOSTS, "gpu.example.org"], ["evil.example"]),
        ("192.0.2.7", ["gpu.example.org"], ["192.0.2.7:80", "gpu.example.org"], ["evil.example"]),
    ],
)  # fmt: skip
def test_the_names_of_a_server(listens, names, answered, refused):
    from gptfast.serving.hosts import is_name_of

    hosts = hosts_of(listens, names)
    assert [name for name in answered if not is_name_of(hosts, name)] == []
    assert [name for name in refused if is_name_of(hosts, name)] == []


def test_a_page_whose_own_name_leads_here_gets_nothing(model, tokenizer):
    """DNS rebinding: for the browser it is the page's own site, so neither CORS nor the policy of the page helps."""
    with serving(create_app(model, tokenizer, "bard", hosts=hosts_of("127.0.0.1"))) as url:
        port = url.rpartition(":")[2]
        rebound = {
            "Host": f"evil.example:{port}",
            "Origin": f"http://evil.example:{port}",
            "Sec-Fetch-Site": "same-origin",
        }
        for path in ("/", "/health", "/v1/models", "/tokenizer_info", "/page/app.js", "/nothing"):
            got = httpx.get(url + path, headers=rebound)
            assert got.status_code == 403 and "bard" not in got.text
        for path in ("/v1/completions", "/v1/chat/completions", "/next_tokens", "/beam_tree", "/tokenize"):
            error = httpx.post(url + path, json=ASK, headers=rebound).json()["error"]
            assert error["code"] == "host_not_allowed" and error["param"] is None
            assert error["message"] == (
                f"this server does not answer to the name 'evil.example:{port}'; if it is one of its own, start it with "
                "--allowed-host evil.example"
            )
        assert httpx.options(url + "/v1/completions", headers=rebound).status_code == 403
        assert httpx.post(url + "/v1/completions", json=ASK, headers={"Host": f"localhost:{port}"}).status_code == 200
        client = openai.OpenAI(base_url=url + "/v1", api_key="-", default_headers={"Host": "evil.example"})
        with client, pytest.raises(openai.PermissionDeniedError, match=r"--allowed-host evil\.example"):
            client.models.list()


@pytest.mark.parametrize(
    ("origins", "headers", "status"),
    [
        ([], {}, 200),  # no browser
        ([], {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 200),
        ([], {"Origin": "http://{host}"}, 200),  # a browser without Sec-Fetch-Site, as over http in a local network
        ([], {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, 200),
        (["https://example.com"], {"Sec-Fetch-Site": "cross-site", "Origin": "https://example.com"}, 200),
        (["*"], {"Sec-Fetch-Site": "cross-site", "Origin": "null"}, 200),
        (["none"], {"Origin": "http://{host}", "Sec-Fetch-Site": "same-origin"}, 200),  # its own page
        (["none"], {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, 403),
        ([], {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ([], {"Origin": "https://evil.example"}, 403),
        ([], {"Origin": "null"}, 403),
        ([], {"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_pages_elsewhere_give_the_model_no_work(model, tokenizer, origins, headers, status):
    """A form, or fetch in the mode no-cors, asks nothing before: the request itself must be refused."""
    with serving(create_app(model, tokenizer, "bard", cors_origins=origins)) as url:
        headers = {name: value.format(host=url[7:]) for name, value in headers.items()}
        got = httpx.post(
            url + "/v1/completions", content=json.dumps(ASK), headers={**headers, "Content-Type": "text/plain"}
        )
        assert got.status_code == status
        if status == 403:
            error = got.json()["error"]
            named = headers.get("Origin", "null")
            assert error["code"] == "origin_not_allowed"
            assert f"start it with --cors-origin {'*' if named == 'null' else named}" in error["message"]
        assert httpx.get(url + "/health", headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["http://gpu", "gpu:8000", "gpu/x", "", "*gpu", "a..b", "-a", "*.", "[::g]"])
def test_names_are_checked_before_the_model_is_loaded(name):
    done = CliRunner().invoke(command, ["serve", "--model", "nowhere", "--allowed-host", name])
    assert done.exit_code == 1 and f"`allowed_host` is {name!r}; expected a name without http://" in str(done.exception)
