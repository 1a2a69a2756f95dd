"""`GPT.runner`: every way of generation takes the engine on the CPU without being asked to, and which weights it uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.backend import has_cpu_ops
from gptfast.batch import read_jobs, run_jobs
from gptfast.engine import EngineRunner
from gptfast.generation import Runner, Scheduler, TorchRunner, generate, score, stream
from gptfast.tokenizer import CharTokenizer
from tests.support.schedulers import run

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
LETTERS = CharTokenizer.train("".join(chr(65 + n) for n in range(61)))


@pytest.fixture
def model() -> GPT:
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=40, vocab_size=61, dropout=0.0)).eval()


def batch_file(model: GPT, folder: Path) -> None:
    source = folder / "prompts.jsonl"
    source.write_text('"abc"\n{"prompt": "ab", "num_beams": 2}\n', encoding="utf-8")
    run_jobs(read_jobs(source, model, LETTERS, {"max_new_tokens": 5}), folder / "texts.jsonl", model, LETTERS)
    assert len((folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def completions(model: GPT, folder: Path) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from gptfast.serving.app import create_app

    with TestClient(create_app(model, LETTERS, "tiny")) as client:
        ask = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "echo": True, "logprobs": 2}
        assert client.post("/v1/completions", json=ask).json()["usage"]["completion_tokens"] == 5


WAYS = {
    "generate": lambda model, _: generate(model, [[1, 2]], max_new_tokens=5),
    "GPT.generate": lambda model, _: model.generate([[1, 2]], max_new_tokens=5),
    "beams": lambda model, _: generate(model, [[1, 2]], max_new_tokens=5, num_beams=2, return_logprobs=True),
    "assistant": lambda model, _: generate(model, [[1, 2]], max_new_tokens=5, assistant_model=model),
    "stream": lambda model, _: list(stream(model, [[1, 2]], max_new_tokens=5)),
    "Scheduler": lambda model, _: (one := Scheduler(model)).submit([1, 2], max_new_tokens=5) and run(one),
    "score": lambda model, _: score(model, [1, 2, 3]),
    "batch file": batch_file,
    "server": completions,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_takes_the_engine_on_the_cpu(way, model, tmp_path, monkeypatch):
    """And looks at the weights once for each model of a call, a scheduler, a batch file, a server."""
    extended: list[Runner] = []
    for kind in (EngineRunner, TorchRunner):
        extend = kind.extend
        monkeypatch.setattr(kind, "extend", lambda self, *a, f=extend, **o: extended.append(self) or f(self, *a, **o))
    looks: list[int] = []
    checksum = gptfast.engine.transparent.checksum
    monkeypatch.setattr(gptfast.engine.transparent, "checksum", lambda x: looks.append(1) or checksum(x))
    WAYS[way](model, tmp_path)
    assert extended and {type(runner) for runner in extended} == {EngineRunner}
    assert len(looks) == (2 if way == "assistant" else 1)


@pytest.mark.parametrize("why", ["training", "backend", "dtype", "hook"])
def test_torch_runs_what_the_engine_cannot(why, model):
    if why == "training":
        model.train()
    if why == "dtype":
        model.double()
    if why == "hook":
        model.h[0].register_forward_hook(lambda *_: None)
    with gptfast.backend("eager" if why == "backend" else "auto"):
        assert type(model.runner(2, 8)) is TorchRunner


def change(model: GPT) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn_like(parameter))


def test_a_scheduler_keeps_the_weights_that_it_was_made_with(model):
    """A change shows in the next scheduler, and in the next call of `generate`."""
    old, scheduler = model.generate([[1, 2]], max_new_tokens=20), Scheduler(model)
    change(model)
    request = scheduler.submit([1, 2], max_new_tokens=20)
    run(scheduler)
    assert [request.sequences[0].tokens] == old != model.generate([[1, 2]], max_new_tokens=20)
    later = Scheduler(model)
    request = later.submit([1, 2], max_new_tokens=20)
    run(later)
    assert [request.sequences[0].tokens] == model.generate([[1, 2]], max_new_tokens=20)


def test_a_server_keeps_the_weights_that_it_began_with(model, monkeypatch):
    """In texts, in scores of echoed prompts, and in the scheduler that replaces one whose step has failed."""
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from gptfast.serving.app import create_app

    ask = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "echo": True, "logprobs": 0, "temperature": 0}
    with TestClient(create_app(model, LETTERS, "tiny")) as client:

        def choice() -> str:
            return json.dumps(client.post("/v1/completions", json=ask).json()["choices"])

        before = choice()
        change(model)
        assert choice() == before
        with monkeypatch.context() as patch:
            patch.setattr(EngineRunner, "decode_steps", lambda *_: 1 / 0)
            patch.setattr(EngineRunner, "sample", lambda *_: 1 / 0)
            assert client.post("/v1/completions", json=ask).status_code == 500
        assert choice() == before
    with TestClient(create_app(model, LETTERS, "tiny")) as client:
        assert choice() != before
