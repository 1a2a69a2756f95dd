"""Fixtures of tests of the server. What needs fastapi is imported inside them: where it is missing, tests are skipped."""

from __future__ import annotations

import pytest

from gptfast.tokenizer import CharTokenizer
from tests.support.browser import browser  # noqa: F401
from tests.support.command import LETTERS


@pytest.fixture(scope="module")
def tokenizer():
    return CharTokenizer.train(LETTERS)


@pytest.fixture(scope="module")
def model(tokenizer):
    from tests.support.serving_app import small_model

    return small_model(tokenizer)


@pytest.fixture(scope="module")
def gated(model):
    from tests.support.serving_app import Gated

    return Gated(model)


@pytest.fixture(scope="module")
def app(gated, tokenizer):
    from tests.support.serving_app import app_of

    return app_of(gated, tokenizer)


@pytest.fixture(scope="module")
def url(app):
    from tests.support.serving_app import serving

    with serving(app) as url:
        yield url


@pytest.fixture
def client(url):
    from tests.support.serving_app import openai

    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def closed(gated):
    """Steps wait from now on, until the test opens the gate."""
    gated.gate.clear()
    yield gated.gate
    gated.gate.set()
