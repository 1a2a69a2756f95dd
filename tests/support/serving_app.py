"""A small model behind the server, and a model whose steps wait. tests/serving/conftest.py has the fixtures."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from gptfast import GPT, GPTConfig
from tests.support.generation_pairs import sharpen

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from gptfast.serving.app import Limits, create_app  # noqa: E402 (fastapi may be missing)
from gptfast.serving.server import GracefulServer, bind  # noqa: E402

BLOCK = 48
ASK = {"model": "bard", "prompt": "to be", "max_tokens": 40}


def small_model(tokenizer):
    torch.manual_seed(1)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=tokenizer.vocab_size)
    model = GPT(config).eval()
    sharpen(model)
    return model


class Gated:
    """The model, but each step waits for `gate` and takes `delay` more, and raises `failure` once where there is one."""

    def __init__(self, model, delay=0.0):
        self.model, self.config, self.failure, self.steps, self.delay = model, model.config, None, 0, delay
        self.gate = threading.Event()
        self.gate.set()

    def runner(self, max_slots, max_len):
        runner = self.model.runner(max_slots, max_len)
        extend = runner.extend

        def gated(*args, **options):
            assert self.gate.wait(30)
            time.sleep(self.delay)
            self.steps += 1
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
            return extend(*args, **options)

        runner.extend, runner.runner = gated, self.runner
        return runner


@contextmanager
def serving(app, grace=0.0, port=0):
    """The base URL of a running server."""
    with bind("127.0.0.1", port) as bound:
        server = GracefulServer(app, bound, log_level="error", grace=grace)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def app_of(model, tokenizer):
    return create_app(model, tokenizer, "bard", Limits(max_rows=4, max_queue=3, max_body=20_000))


def new_text(model, tokenizer, prompt, **options):
    ids = tokenizer.encode(prompt)
    return [tokenizer.decode(row[len(ids) :]) for row in model.generate([ids], **options)]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
