"""gptfast serve for lm-evaluation-harness's client: /tokenizer_info, /tokenize, /detokenize, and scores over HTTP."""

from __future__ import annotations

import pytest

from gptfast.tokenizer import get_tokenizer
from tests.evaluation.harness_tasks import write_model
from tests.support.serving_app import Limits, create_app, httpx, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(folder):
    from gptfast import GPT

    model = GPT.from_pretrained(folder).compile_for_inference("float32")
    with serving(create_app(model, get_tokenizer("gpt2"), "small", Limits())) as url:
        yield url


def test_text_to_ids_and_back(address):
    text = "To be<|endoftext|>caf\u00e9"
    info = httpx.get(address + "/tokenizer_info").json()
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>" and info["vocab_size"] == 50257
    found = httpx.post(address + "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert found["tokens"] == get_tokenizer("gpt2").encode(text, allowed_special="all")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 64)
    assert httpx.post(address + "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "prompt: Field required"),
        ("/tokenize", {"prompt": 5}, "prompt: Input should be a valid string"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0: Input should be a valid integer"),
        ("/detokenize", {"tokens": [1, 50257]}, "tokens: 50257 has no token; ids run to 50256"),
        ("/detokenize", {"tokens": [-1]}, "tokens: -1 has no token"),
    ],
)
def test_bad_bodies_name_the_field(address, path, body, message):
    answer = httpx.post(address + path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
def test_the_tokenizer_of_another_model_is_not_there(address, path, body):
    answer = httpx.post(address + path, json={**body, "model": "large"})
    assert answer.status_code == 404 and "the model 'large' does not exist" in answer.json()["error"]["message"]
    assert httpx.post(address + path, json={**body, "model": "small"}).status_code == 200


def test_the_tokenizer_is_behind_the_key(folder):
    from gptfast import GPT

    model = GPT.from_pretrained(folder).compile_for_inference("float32")
    with serving(create_app(model, get_tokenizer("gpt2"), "small", Limits(), api_key="secret")) as url:
        for ask in (httpx.get(url + "/tokenizer_info"), httpx.post(url + "/tokenize", json={"prompt": "a"})):
            assert ask.status_code == 401
        named = {"Authorization": "Bearer secret"}
        assert httpx.post(url + "/tokenize", json={"prompt": "a"}, headers=named).json()["tokens"] == [64]


@pytest.mark.slow
def test_local_completions_of_the_harness(address, folder):
    """The harness finds the tokenizer by itself; its scores and texts are those of our model without a server."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from gptfast.evaluation.harness_model import GPTFastLM

    client = LocalCompletionsAPI(base_url=address + "/v1/completions", model="small", max_length=64)
    assert client.tokenizer_backend == "remote" and client.prefix_token_id == 50256
    here = GPTFastLM(str(folder), "float32")
    pairs = [("To be, or not", " to be"), ("", "To be"), ("One two ", "three"), ("a", " b" * 20)]

    def asked(kind, pairs):
        return [Instance(kind, {}, pair, n, ("own", n, 1)) for n, pair in enumerate(pairs)]

    scores = client.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    for (found, greedy), (expected, is_greedy) in zip(scores, here.loglikelihood(asked("", pairs)), strict=True):
        assert found == pytest.approx(expected, abs=1e-4) and greedy == is_greedy
    texts = asked("generate_until", [("To be", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False})])
    assert client.generate_until(texts, disable_tqdm=True) == here.generate_until(texts)
