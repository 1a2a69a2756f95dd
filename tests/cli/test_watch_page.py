"""`gptfast watch --serve`: a run as a page, while it trains and after its end, in a real browser and by what it answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from gptfast._locks import FileLock
from gptfast.cli._watch_page import run_of, samples_of, thinned
from gptfast.cli._watch_show import Sample
from gptfast.cli._watch_viewer import Viewer, Viewing
from tests.support.browser import wait
from tests.support.train_command import gptfast, run

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from gptfast.serving.run_page import create_run_app  # noqa: E402 (fastapi may be missing)
from gptfast.serving.server import bind  # noqa: E402

EVERY = 0.1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A finished run of 12 steps that no test changes."""
    out = tmp_path_factory.mktemp("seen") / "run"
    assert run(text, out) == 0
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def viewer_of(out: Path, **options) -> Viewer:
    return Viewer(Viewing(run=out, every=EVERY, serve=True, **{"tokens": 8, **options}), Console())


@pytest.fixture
def served():
    """Serves viewers; calling it returns (URL, what ends the server)."""
    ends = []

    def serve(viewer: Viewer):
        app = create_run_app(lambda: run_of(viewer), lambda: samples_of(viewer), EVERY)
        bound = bind("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()

        def end():
            server.should_exit = True
            thread.join(20)
            bound.close()
            assert not thread.is_alive()

        ends.append(end)
        return f"http://127.0.0.1:{bound.getsockname()[1]}", end

    yield serve
    for end in ends:
        end()


# ---- what it answers ----


def test_the_answer_is_the_log(trained, served):
    url, _ = served(viewer_of(trained))
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    found = httpx.get(url + "/run").json()
    assert (found["state"], found["step"], found["planned_steps"]) == ("complete", 12, 12)
    for name, points in found["curves"].items():
        assert points == [[r["step"], r[name]] for r in records if name in r] and len(points) >= 4, name
    [sample] = httpx.get(url + "/samples").json()
    assert sample["step"] == 12 and len(sample["text"]) == 8
    page = httpx.get(url)
    assert "gptfast watch" in page.text and "script-src 'self'" in page.headers["content-security-policy"]
    for name in ("run.js", "chart.js", "style.css"):
        assert httpx.get(f"{url}/page/{name}").status_code == 200
    for path in ("/v1/models", "/page/index.html", "/page/run.html", "/run/x"):
        assert httpx.get(url + path).status_code == 404


def test_other_names_of_this_machine_get_nothing(trained, served):
    """A page elsewhere may let its own name lead to 127.0.0.1; the browser then sends that name."""
    url, _ = served(viewer_of(trained))
    refused = httpx.get(url + "/run", headers={"Host": "evil.example"})
    assert refused.status_code == 403 and "open it as http://localhost" in refused.json()["error"]["message"]
    assert httpx.get(url + "/run", headers={"Host": "localhost:9000"}).status_code == 200


def test_what_is_missing_or_damaged_is_said_in_words(out, tmp_path):
    missing = run_of(viewer_of(tmp_path / "none", wait=True))
    assert (
        missing["state"] == "waiting" and "there is no folder" in missing["message"] and "--wait" in missing["message"]
    )
    (out / "log.jsonl").write_text('{"step": 1, "loss": NaN, "lr": 0.1}\nnothing\n{"step": 3}\n')
    assert "line 2 is not valid JSON" in run_of(viewer_of(out))["message"]
    assert samples_of(viewer_of(out)) == []


def test_a_loss_that_is_no_number_is_left_out(out, served, capsys):
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 13, "loss": NaN, "val_loss": Infinity, "lr": 0.001}\n')
    url, _ = served(viewer_of(out, samples=False))
    found = httpx.get(url + "/run").json()
    assert found["loss"] is None and found["curves"]["loss"][-1][0] == 12 and found["curves"]["lr"][-1][0] == 13
    assert gptfast("watch", out, "--json", "--no-samples") == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["loss"] is None


def test_many_browsers_cost_one_look(served):
    looks = []
    app = create_run_app(lambda: looks.append(1) or {"run": len(looks)}, list, every=60)
    from starlette.testclient import TestClient

    with TestClient(app, base_url="http://localhost") as client:
        assert {client.get("/run").json()["run"] for _ in range(50)} == {1} and len(looks) == 1


def test_samples_of_several_checkpoints_stay(out):
    viewer, drawn = viewer_of(out), []
    viewer._new_sample = lambda folder, step: drawn.append(step) or Sample(step, text="a")

    def saved(step):
        viewer.draw_sample(SimpleNamespace(out=out, checkpoint=SimpleNamespace(state=SimpleNamespace(step=step))))
        return [one.step for one in viewer.samples]

    assert [saved(step) for step in (3, 6, 6, 9)][-1] == [3, 6, 9] == drawn
    assert saved(5) == [3, 5], "a run that went back has no samples of later steps"
    assert [saved(step) for step in range(6, 20)][-1] == [15, 16, 17, 18, 19]


def test_long_curves_are_thinned_and_keep_their_peaks():
    points = [(n, float(n % 7)) for n in range(10_000)]
    points[5000] = (5000, 99.0)
    found = thinned(points, 100)
    assert len(found) <= 100 and found[0] == points[0] and found[-1] == points[-1] and (5000, 99.0) in found
    assert [x for x, _ in found] == sorted({x for x, _ in found}) and thinned(points[:50], 100) == points[:50]


# ---- the command ----


def test_errors_of_the_command(trained, tmp_path, monkeypatch, capsys):
    for arguments, text in (
        ([trained, "--serve", "--once"], "--serve shows the run until Ctrl-C; leave out --once and --json"),
        ([tmp_path / "none", "--serve"], "there is no folder"),
        ([trained, "--serve", "--port", "70000"], "--port is 70000; expected 0 to 65535"),
    ):
        assert gptfast("watch", *arguments) == 1
        assert text in capsys.readouterr().err
    with bind("127.0.0.1", 0) as taken:
        assert gptfast("watch", trained, "--serve", "--port", str(taken.getsockname()[1])) == 1
        assert "choose another --port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gptfast.serving.run_page", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert gptfast("watch", trained, "--serve") == 1
    assert "pip install 'gptfast-kernels[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(trained):
    command = [sys.executable, "-m", "gptfast", "watch", trained, "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        line = child.stdout.readline()
        url = line.split(" at ")[1].split()[0]
        assert httpx.get(url + "run", timeout=30).json()["state"] == "complete"
        child.send_signal(signal.SIGINT)
        assert (child.wait(20), child.stderr.read()) == (0, "")


# ---- a browser ----


@pytest.mark.slow
def test_a_run_in_the_browser_while_it_trains_and_afterwards(browser, out, served):
    def train(first, last):
        with (out / "log.jsonl").open("a") as log:
            for n in range(first, last + 1):
                record = {"step": n, "loss": 2 - n / 64, "val_loss": 2.5, "lr": 0.001, "tokens_per_second": 1234.5}
                log.write(json.dumps({**record, "planned_steps": 20}) + "\n")

    train(13, 15)
    lock = FileLock(out / "training.lock")
    assert lock.acquire() is None
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    try:
        url, end = served(viewer_of(out, prompt="Is"))
        page.goto(url)
        wait(page, "document.querySelectorAll('#loss .curve').length === 2")
        assert f"Running (process {os.getpid()}" in page.text_content("#state")
        assert page.evaluate("document.getElementById('progress').value") == 0.75
        figures = page.text_content("#figures")
        for text in ("15 of 20", "1.7656", "2.5000", "1,235", "0.001", "step 12"):
            assert text in figures
        wait(page, "document.querySelectorAll('#samples .turn').length === 1")
        assert page.text_content("#samples b") == "Is"
        train(16, 20)  # the run goes on
        wait(page, "document.getElementById('figures').textContent.includes('20 of 20')")
        box = page.locator("#loss svg").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 50)
        told = page.text_content("#loss .reading")
        assert told == "training (one batch) 1.688 at step 20, validation 2.5 at step 20"
        page.mouse.move(0, 0)
        page.focus("#lr svg")
        page.keyboard.press("ArrowLeft")
        assert "at step 20" in page.text_content("#lr .reading")
        page.keyboard.press("ArrowLeft")
        assert "at step 19" in page.text_content("#lr .reading")
        assert "at step 20" in page.locator("#lr svg").get_attribute("aria-label")
    finally:
        lock.release()
    wait(page, "document.getElementById('state').textContent.startsWith('Stopped early; continue from step 12')")
    page.reload()
    wait(page, "document.querySelectorAll('#speed .curve').length === 1")
    assert wrong == []
    end()
    page.wait_for_selector("#notice:not([hidden])")
    assert "gptfast watch does not answer" in page.text_content("#notice")
    assert "20 of 20" in page.text_content("#figures"), "the last that it said stays"
    page.close()


@pytest.mark.slow
def test_texts_of_a_run_are_never_markup_and_a_phone_shows_all(browser, out, served):
    sent = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 13, "loss": 1.0, "wrong": sent}) + "\n")
    viewer = viewer_of(out)
    viewer._written = lambda folder: Sample(0, sent, sent)
    page = browser.new_page(viewport={"width": 360, "height": 740})
    url, _ = served(viewer)
    page.goto(url)
    wait(page, "document.querySelectorAll('#samples .turn').length === 1")
    assert page.text_content("#samples .body") == sent * 2 and f"step 13: {sent}" in page.text_content("#alarms")
    assert page.locator("img, #samples script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is cut at the side"
    page.close()
