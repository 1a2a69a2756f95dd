"""The page at `/`: what is sent and with which headers, what it asks of the server, and the page in a real browser."""

from __future__ import annotations

import asyncio
import math
import re

import pytest
import torch

from gptfast.generation.beam_tree import beam_tree
from gptfast.serving.pages import read_page
from gptfast.serving.text import printable_token
from gptfast.tokenizer.conversation import ChatFormat
from tests.finetuning.models import gpt
from tests.support.browser import wait
from tests.support.chat_templates import tokenizer_with
from tests.support.serving_app import Limits, create_app, httpx, serving

HELLO = [{"role": "user", "content": "sat the dog?"}]


@pytest.fixture(scope="module")
def model():
    return gpt(tokenizer_with("chatml").vocab_size, block_size=96)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with("chatml")


@pytest.fixture(scope="module")
def url(model, tokenizer):
    with serving(create_app(model, tokenizer, "cat", Limits(max_rows=4), api_key=None)) as url:
        yield url


# ---- the files ----


def test_every_file_is_sent_with_a_policy(url):
    names = [name for name in read_page() if not name.endswith(".html")]
    assert len(names) >= 13
    for path in ("/", *(f"/page/{name}" for name in names)):
        got = httpx.get(url + path)
        assert got.status_code == 200
        policy = got.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy and "unsafe" not in policy
        assert got.headers["x-content-type-options"] == "nosniff"
        wanted = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(
            path.rpartition(".")[2], "text/html"
        )
        assert got.headers["content-type"].startswith(wanted)
    assert httpx.head(url + "/").status_code == 200
    for path in ("/page/none.js", "/page/..%2fapp.py", "/page/%2e%2e/pages.py", "/page/run.html"):
        assert httpx.get(url + path).status_code == 404


def test_the_page_asks_for_nothing_from_elsewhere_and_inserts_no_html():
    for name, content in read_page().items():
        text = content.decode()
        assert len(text.splitlines()) < 300, name
        for found in re.findall(r"https?://[^\s\"'`)]+", text):
            assert found == "http://www.w3.org/2000/svg", f"{name} names {found}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text), name
        assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|style=", text), f"{name} has code or style inline"
    linked = {found for text in read_page().values() for found in re.findall(r'"/page/([\w.]+)"', text.decode())}
    imported = {found for text in read_page().values() for found in re.findall(r'from "\./([\w.]+)"', text.decode())}
    assert linked | imported == {name for name in read_page() if not name.endswith(".html")}


def test_the_page_needs_no_key_and_its_questions_do(model, tokenizer):
    with serving(create_app(model, tokenizer, "cat", api_key="sesame")) as url:
        assert httpx.get(url + "/").status_code == 200
        for path in ("/next_tokens", "/beam_tree"):
            assert httpx.post(url + path, json={"model": "cat", "prompt": "a"}).status_code == 401


# ---- the questions ----


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 1.5, "top_k": 4, "top_p": 0.8}, {"min_p": 0.05, "temperature": 0.7}],
)
def test_next_tokens_are_those_that_are_drawn(url, model, tokenizer, options):
    ids = tokenizer.encode("the cat")
    body = {"model": "cat", "prompt": "the cat", "top": 50, **options}
    got = httpx.post(url + "/next_tokens", json=body).json()
    assert got["prompt_tokens"] == len(ids)
    with torch.no_grad():
        own = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    for entry in got["tokens"]:
        assert entry["logprob"] == pytest.approx(own[entry["id"]].item(), abs=1e-3)
    rows = model.generate([ids], max_new_tokens=1, num_return_sequences=4000, seed=1, **{"temperature": 1.0, **options})
    counts = torch.bincount(torch.tensor([row[-1] for row in rows]), minlength=tokenizer.vocab_size) / 4000
    shown = {entry["id"]: entry["probability"] for entry in got["tokens"]}
    for token, p in shown.items():  # five standard deviations
        assert abs(counts[token].item() - p) <= 5 * math.sqrt(max(p * (1 - p), 1e-4) / 4000)
    ranked = [entry["probability"] for entry in got["tokens"]]
    assert ranked == sorted(ranked, reverse=True)
    if "top_k" in options:
        assert sum(p > 0 for p in ranked) <= 4 and sum(ranked) == pytest.approx(1, abs=1e-5)


def test_next_tokens_of_replies_and_behind_what_was_written(url, model, tokenizer):
    prompt = ChatFormat.of(tokenizer).prompt(HELLO)
    body = {"model": "cat", "messages": HELLO, "continuation": " the cat", "temperature": 0}
    got = httpx.post(url + "/next_tokens", json=body).json()
    ids = prompt + tokenizer.encode(" the cat")
    assert got["prompt_tokens"] == len(ids)
    assert got["tokens"][0]["id"] == model.generate([ids], max_new_tokens=1)[0][-1]
    assert [entry["probability"] for entry in got["tokens"]] == [1.0] + [0.0] * 19
    free = httpx.post(url + "/next_tokens", json={**body, "temperature": 1}).json()["tokens"]
    held = httpx.post(url + "/next_tokens", json={**body, "temperature": 1, "presence_penalty": 2}).json()["tokens"]
    new = tokenizer.encode(" the cat")[-1]
    before, after = ({entry["id"]: entry["probability"] for entry in tokens}.get(new, 0) for tokens in (free, held))
    assert after < before or before == 0


def test_the_beam_tree_is_that_of_explain(url, model, tokenizer):
    got = httpx.post(url + "/beam_tree", json={"model": "cat", "prompt": "the cat", "beams": 3, "steps": 4}).json()
    wanted = beam_tree(model, tokenizer.encode("the cat"), beams=3, steps=4)
    assert [(n["parent"], n["depth"], n["token"], n["kept"]) for n in got["nodes"]] == [
        (n.parent, n.depth, n.token, n.kept) for n in wanted
    ]
    assert [n["logprob"] for n in got["nodes"]] == pytest.approx([n.logprob for n in wanted], abs=1e-3)
    assert {n["text"] for n in got["nodes"]} == {printable_token(tokenizer, n.token) for n in wanted}


@pytest.mark.parametrize("path", ["/next_tokens", "/beam_tree"])
@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"prompt": "a"}, 400, "model: Field required"),
        ({"model": "dog", "prompt": "a"}, 404, "the model 'dog' does not exist"),
        ({"model": "cat"}, 400, "expected one of prompt and messages"),
        ({"model": "cat", "prompt": "a", "messages": HELLO}, 400, "expected one of prompt and messages"),
        ({"model": "cat", "messages": [{"content": "a"}]}, 400, "messages[0] has no role"),
        ({"model": "cat", "prompt": "cat " * 200}, 400, "the context of this model is 96 tokens; the text has"),
        ({"model": "cat", "prompt": "a", "tops": 3}, 400, "tops: this server has no such field"),
    ],
)
def test_bad_questions(url, path, body, status, text):
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == status and text in answer.json()["error"]["message"]


def test_bounds_of_questions(url):
    ask = {"model": "cat", "prompt": "a"}
    for path, more in (
        ("/next_tokens", {"top": 51}),
        ("/next_tokens", {"temperature": 3}),
        ("/beam_tree", {"beams": 9}),
    ):
        assert httpx.post(url + path, json={**ask, **more}).status_code == 400
    long = httpx.post(url + "/next_tokens", json={**ask, "prompt": "cat " * 200}).json()["error"]
    assert long["message"].endswith(" - shorten it") and long["code"] == "context_length_exceeded"  # it has no `steps`
    full = {**ask, "prompt": [], "continuation": "x"}
    assert httpx.post(url + "/next_tokens", json=full).status_code == 400


def test_five_hundred_tabs_at_once(url, tokenizer):
    """Each gets the page, and the answer to its own question or the word that the server is busy; none that of another."""
    texts = ["the cat", "the dog sat", "a bird", "on the log while"]
    asked = [{"model": "cat", "prompt": text, "top": 3} for text in texts]
    wanted = [httpx.post(url + "/next_tokens", json=body).json() for body in asked]
    assert len({str(one["tokens"]) for one in wanted}) == len(texts)

    async def tab(client, n):
        page = await client.get(url)
        return page.status_code, await client.post(url + "/next_tokens", json=asked[n % len(asked)])

    async def tabs():
        # none kept open: on a busy machine the server may close one as it is used again
        limits = httpx.Limits(max_connections=500, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            return await asyncio.gather(*(tab(client, n) for n in range(500)))

    found = asyncio.run(tabs())
    assert {status for status, _ in found} == {200}
    served = 0
    for n, (_, answer) in enumerate(found):
        if answer.status_code == 200:
            served += 1
            assert answer.json() == wanted[n % len(wanted)]
        else:
            assert answer.status_code == 429 and "too many requests" in answer.json()["error"]["message"]
    assert served >= 64
    assert httpx.post(url + "/next_tokens", json=asked[0]).json() == wanted[0]


# ---- a browser ----


@pytest.fixture
def page(browser, url):
    """The page, whose errors and requests elsewhere fail the test."""
    context = browser.new_context()
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    page.on("request", lambda request: request.url.startswith((url, "data:")) or wrong.append(request.url))
    page.goto(url)
    wait(page, "document.getElementById('model').value === 'cat'")
    yield page
    context.close()
    assert wrong == []


def send(page, text):
    page.fill("#input", text)
    page.click("#send")
    wait(page, "document.getElementById('stop').disabled && !document.getElementById('send').disabled")


def replies(page):
    return page.locator(".turn .body").all_text_contents()


def bars(page):
    return page.locator("#bars .number").all_text_contents()


@pytest.mark.slow
def test_type_stream_hover_reload(page, url):
    page.fill("#system", "you are a cat")
    page.locator("#set-max_tokens").fill("20")
    send(page, "sat the dog?")
    messages = [{"role": "system", "content": "you are a cat"}, *HELLO]
    ask = {"model": "cat", "messages": messages, "max_completion_tokens": 20, "temperature": 0.8, "seed": 0}
    wanted = httpx.post(url + "/v1/chat/completions", json=ask).json()["choices"][0]["message"]["content"]
    assert replies(page) == ["sat the dog?", wanted]
    token = page.locator(".token").first
    assert token.evaluate("e => getComputedStyle(e).cursor") == "help"
    token.hover()
    tip = page.locator("#tip")
    assert tip.is_visible() and tip.locator("li").count() >= 5 and "%" in tip.text_content()
    token.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.token')[1]")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.reload()
    wait(page, "document.getElementById('model').value === 'cat'")
    assert replies(page) == ["sat the dog?", wanted] and page.input_value("#system") == "you are a cat"
    assert page.locator(".token").count() > 0 and page.input_value("#set-max_tokens") == "20"
    page.click("#again")
    wait(page, "document.getElementById('stop').disabled")
    assert replies(page)[0] == "sat the dog?" and replies(page)[1] != wanted
    page.click("#clear")
    assert replies(page) == []


@pytest.mark.slow
def test_sliders_change_the_bars(page):
    page.check("input[value=completion]")
    page.fill("#input", "the cat")
    wait(page, "document.querySelectorAll('#bars li').length > 5")
    before = bars(page)
    page.locator("#set-temperature").fill("0.2")
    wait(page, f"document.querySelector('#bars .number').textContent !== {before[0]!r}")
    assert float(bars(page)[0].rstrip("%")) > float(before[0].rstrip("%"))
    page.locator("#set-top_k").fill("2")
    wait(page, "document.querySelectorAll('#bars .never').length >= 5")
    page.click("#reset")
    wait(page, f"document.querySelector('#bars .number').textContent === {before[0]!r}")
    page.click("#beams summary")
    page.locator("#set-beams").fill("4")
    wait(page, "document.querySelectorAll('#tree g').length === 4 + 3 * 16")
    assert page.locator("#tree g.kept").count() == 16
    page.click("#as-curl")
    assert "/v1/completions'" in page.text_content("#code-text") and '"prompt":"the cat"' in page.text_content(
        "#code-text"
    )
    page.keyboard.press("Escape")
    page.click("#as-python")
    shown = page.text_content("#code-text")
    compile(shown, "shown", "exec")
    assert "client.completions.create(" in shown and "extra_body={" in shown


@pytest.mark.slow
def test_stop(browser, model, tokenizer):
    from tests.support.serving_app import Gated

    page = browser.new_page()
    with serving(create_app(Gated(model, delay=0.1), tokenizer, "cat")) as url:
        page.goto(url)
        wait(page, "document.getElementById('model').value === 'cat'")
        page.fill("#input", "the dog")
        page.keyboard.press("Control+Enter")
        wait(page, "document.querySelectorAll('.token').length > 3")
        page.click("#stop")
        wait(page, "document.getElementById('status').textContent.includes('stopped')")
        stopped = replies(page)
        assert len(stopped) == 2 and stopped[1]
        assert not page.locator("#notice").is_visible()
    page.close()


GONE = "The server does not answer. Is gptfast serve still running?"
CONNECTED = "document.getElementById('notice').hidden && document.getElementById('model').value === "


@pytest.mark.slow
def test_a_server_that_is_gone_and_comes_back(browser, model, tokenizer):
    """What was written stays, what could not be sent can be sent again, and nothing needs to be loaded again."""
    page = browser.new_page()
    with serving(create_app(model, tokenizer, "cat")) as url:
        page.goto(url)
        wait(page, "document.getElementById('model').value === 'cat'")
        page.locator("#set-max_tokens").fill("8")
        send(page, "the cat")
        page.check("input[value=completion]")
        send(page, "the dog")
        chat, written = page.evaluate("['turns', 'written'].map((n) => sessionStorage.getItem('gptfast.' + n))")
    assert "the cat" in chat and "the dog" in written
    for mode in ("completion", "chat"):
        page.check(f"input[value={mode}]")
        before = replies(page)
        page.fill("#input", "and the bird?")
        page.click("#send")
        page.wait_for_selector("#notice:not([hidden])")
        assert GONE in page.text_content("#notice")
        wait(page, "!document.getElementById('send').disabled")
        assert replies(page) == before and len(before) == 2 and page.input_value("#input") == "and the bird?"
    page.click("#again")
    wait(page, "!document.getElementById('again').disabled")
    assert replies(page) == before
    assert [chat, written] == page.evaluate("['turns', 'written'].map((n) => sessionStorage.getItem('gptfast.' + n))")
    with serving(create_app(model, tokenizer, "dog"), port=int(url.rpartition(":")[2])):
        wait(page, CONNECTED + "'dog'")  # by itself, also where another model is served now
        wait(page, "document.querySelectorAll('#bars li').length > 5")
        page.click("#send")
        wait(page, "document.querySelectorAll('.turn').length === 4 && !document.getElementById('send').disabled")
        assert replies(page)[:3] == [*before, "and the bird?"] and page.input_value("#input") == ""
        assert page.locator("#notice").is_hidden()
    page.close()


@pytest.mark.slow
def test_a_page_opened_with_the_server_gone(browser, url):
    """Its files came, perhaps from the browser's memory, and then nobody answers."""
    page = browser.new_page()
    away = re.compile(r"/(v1/models|next_tokens|v1/chat/completions)$")
    page.route(away, lambda route: route.abort("connectionrefused"))
    page.goto(url)
    page.wait_for_selector("#notice:not([hidden])")
    assert GONE in page.text_content("#notice") and page.input_value("#model") == ""
    page.fill("#input", "sat the dog?")
    page.click("#send")
    assert page.input_value("#input") == "sat the dog?" and replies(page) == []
    page.unroute(away)
    wait(page, CONNECTED + "'cat'")
    page.locator("#set-max_tokens").fill("4")
    page.click("#send")
    wait(page, "document.querySelectorAll('.token').length && !document.getElementById('send').disabled")
    assert replies(page)[0] == "sat the dog?" and len(replies(page)) == 2
    page.close()


@pytest.mark.slow
def test_clear_and_another_mode_while_a_text_is_written(browser, model, tokenizer):
    """What still arrives belongs to nothing that is shown."""
    from tests.support.serving_app import Gated

    page = browser.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    with serving(create_app(Gated(model, delay=0.1), tokenizer, "cat")) as url:
        page.goto(url)
        wait(page, "document.getElementById('model').value === 'cat'")
        for mode in ("chat", "completion"):
            page.check(f"input[value={mode}]")
            page.fill("#input", "the dog")
            page.keyboard.press("Control+Enter")
            wait(page, "document.querySelectorAll('.token').length > 2")
            page.click("#clear")
            wait(page, "document.getElementById('stop').disabled")
            stored = page.evaluate("['turns', 'written'].map((n) => sessionStorage.getItem('gptfast.' + n))")
            assert replies(page) == [] and stored == ["[]", "null"]
        page.fill("#input", "the dog")
        page.keyboard.press("Control+Enter")
        wait(page, "document.querySelectorAll('.token').length > 2")
        page.check("input[value=chat]")
        wait(page, "document.getElementById('stop').disabled")
        assert replies(page) == []
        page.check("input[value=completion]")
        assert len(replies(page)) == 2 and replies(page)[1], "what came before stays"
    page.close()
    assert wrong == []


@pytest.mark.slow
def test_text_is_never_markup(page):
    sent = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.locator("#set-max_tokens").fill("3")
    send(page, sent)
    assert replies(page)[0] == sent and page.locator("#output img, #output script").count() == 0


@pytest.mark.slow
def test_a_key_is_asked_for(browser, model, tokenizer):
    page = browser.new_page()
    with serving(create_app(model, tokenizer, "cat", api_key="sesame")) as url:
        page.goto(url)
        page.wait_for_selector("#notice:not([hidden])")
        assert "enter it above" in page.text_content("#notice")
        page.fill("#key", "sesame")
        page.keyboard.press("Tab")
        wait(page, "document.getElementById('model').value === 'cat'")
        send(page, "the cat")
        assert len(replies(page)) == 2 and not page.locator("#notice").is_visible()
    page.close()


@pytest.mark.slow
def test_on_a_phone_and_by_keyboard(browser, url):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(url)
    wait(page, "document.getElementById('model').value === 'cat'")
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is cut at the side"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"model", "theme", "system", "input", "send", "clear", "set-temperature", "as-curl", "draw-beams"} <= reached
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.close()
