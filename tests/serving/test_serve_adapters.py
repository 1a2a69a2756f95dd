"""gptfast serve with adapters: names, one batch of all of them, and what is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import sys

import pytest
import torch

from gptfast.finetuning import LoraConfig, PromptTuningConfig
from gptfast.generation import score
from tests.support.command import save_model
from tests.support.serving_app import BLOCK, Gated, app_of, httpx, openai, serving, wait_until


@pytest.fixture(scope="module")
def adapted(model):
    gpt = copy.deepcopy(model)
    torch.manual_seed(4)
    for name in ("poems", "plays"):
        gpt.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False), name)
        for own, parameter in gpt.named_parameters():
            if f".{name}." in own:
                torch.nn.init.normal_(parameter, std=0.3)
    return gpt.eval()


def adapter_of(name):
    return name.partition(":")[2] or "__base__"


def text_of(gpt, tokenizer, name, prompt, **options):
    (row,) = gpt.generate([tokenizer.encode(prompt)], adapter_names=[adapter_of(name)], **options)
    return tokenizer.decode(row[len(prompt) :])


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_requests_of_all_adapters_run_in_one_batch(adapted, tokenizer, quantize):
    gpt = adapted if quantize is None else adapted.compile_for_inference(quantize)
    names, prompts = ["bard", "bard:poems", "bard:plays"], ["to be", "ROMEO:"]
    asked = [(name, prompt) for name in names for prompt in prompts][:4]
    gated = Gated(gpt)
    gated.gate.clear()
    app = app_of(gated, tokenizer)
    with serving(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:

        def ask(name, prompt):
            return client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            answers = [pool.submit(ask, *of) for of in asked]
            wait_until(lambda: app.state.worker.open_sequences == 4)
            gated.gate.set()
            for (name, prompt), answer in zip(asked, answers, strict=True):
                got = answer.result()
                assert got.model == name
                assert got.choices[0].text == text_of(gpt, tokenizer, name, prompt, max_new_tokens=12)
        assert gated.steps < 3 * 12, "together: alone these are 48 steps"
        streamed = client.completions.create(model="bard:poems", prompt="or", max_tokens=9, temperature=0, stream=True)
        chunks = list(streamed)
        assert {chunk.model for chunk in chunks} == {"bard:poems"}
        new = "".join(chunk.choices[0].text for chunk in chunks)
        assert new == text_of(gpt, tokenizer, "bard:poems", "or", max_new_tokens=9)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_whose_adapters_are_disabled_is_served_alone(adapted, tokenizer, quantize):
    gpt = copy.deepcopy(adapted)
    gpt = gpt if quantize is None else gpt.compile_for_inference(quantize)
    gpt.disable_adapters()
    with serving(app_of(gpt, tokenizer)) as url:
        assert [card["id"] for card in httpx.get(url + "/v1/models").json()["data"]] == ["bard"]
        answer = httpx.post(url + "/v1/completions", json={"model": "bard:poems", "prompt": "a"})
        assert answer.status_code == 404


def test_models_are_listed_and_unknown_ones_are_named(adapted, tokenizer):
    with serving(app_of(adapted, tokenizer)) as url:
        listed = httpx.get(url + "/v1/models").json()["data"]
        assert [card["id"] for card in listed] == ["bard", "bard:poems", "bard:plays"]
        assert [card.get("parent") for card in listed] == [None, "bard", "bard"]
        assert httpx.get(url + "/v1/models/bard:poems").json() == listed[1]
        for name in ("bard:songs", "poems", "bard:", "bard:__base__"):
            answer = httpx.post(url + "/v1/completions", json={"model": name, "prompt": "a"})
            assert answer.status_code == httpx.get(f"{url}/v1/models/{name}").status_code == 404
            error = answer.json()["error"]
            assert error["code"] == "model_not_found"
            expected = f"the model {name!r} does not exist; this server has 'bard', 'bard:poems', 'bard:plays'"
            assert error["message"] == expected


def test_an_echoed_prompt_has_the_scores_of_its_adapter(adapted, tokenizer):
    ids = tokenizer.encode("to be or")
    with serving(app_of(adapted, tokenizer)) as url:
        for name in ("bard", "bard:plays"):
            ask = {"model": name, "prompt": "to be or", "echo": True, "max_tokens": 0, "logprobs": 0}
            got = httpx.post(url + "/v1/completions", json=ask).json()
            wanted = score(adapted, ids, adapter=adapter_of(name))
            assert got["model"] == name
            assert got["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--adapter", "poems"], "--adapter is 'poems'; expected NAME=FOLDER"),
        (["--adapter", "=x"], "--adapter is '=x'; expected NAME=FOLDER"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter names 'a' twice; each needs a name of its own"),
        (["--adapter", "a=./nowhere"], "nowhere holds no adapter_config.json"),
        (["--adapter", "a.b={}"], "name is 'a.b'; expected a text without dots"),
    ],
)
def test_errors_of_the_option(tokenizer, tmp_path, monkeypatch, capsys, args, match):
    from gptfast.cli import main

    gpt = save_model(tmp_path / "model", tokenizer, BLOCK)
    gpt.add_adapter(LoraConfig(r=2))
    gpt.save_adapter(tmp_path / "own")
    given = [arg.format(tmp_path / "own") for arg in args]
    monkeypatch.setattr(sys, "argv", ["gptfast", "serve", "--model", str(tmp_path / "model"), "--port", "0", *given])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and match in capsys.readouterr().err


def test_the_command_serves_adapters(tokenizer, tmp_path, monkeypatch):
    """Those of the folders, beside a packed base."""
    from gptfast import GPT
    from gptfast.cli import main
    from gptfast.serving import server

    gpt = save_model(tmp_path / "bard", tokenizer, BLOCK)
    for name in ("one", "two"):
        gpt.add_adapter(LoraConfig(r=2, init_lora_weights=False), name)
        gpt.save_adapter(tmp_path / name, name)
    served = []
    monkeypatch.setattr(server, "run", lambda app, bound: served.append(app))
    options = [f"--adapter={name}={tmp_path / name}" for name in ("one", "two")]
    monkeypatch.setattr(
        sys, "argv", ["gptfast", "serve", "--model", str(tmp_path / "bard"), "--port=0", "--quantize=int8", *options]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    again = GPT.from_pretrained(tmp_path / "bard").eval()
    again.load_adapter(tmp_path / "one", "one")
    packed = again.compile_for_inference("int8")
    with serving(served[0]) as url:
        ask = {"model": "bard:one", "prompt": "to be", "max_tokens": 9, "temperature": 0}
        got = httpx.post(url + "/v1/completions", json=ask).json()
    assert got["choices"][0]["text"] == text_of(packed, tokenizer, "bard:one", "to be", max_new_tokens=9)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_finetune_wrote_is_served(tmp_path, monkeypatch, quantize):
    """An adapter of qlora and a soft prompt, in one batch with the base, and in a chat."""
    from gptfast.serving import server
    from gptfast.tokenizer import load_tokenizer
    from tests.support.finetuning import base, files
    from tests.support.train_command import gptfast

    monkeypatch.setattr(sys, "argv", [])
    base(tmp_path / "base", n_embd=64)
    common = ["--batch-size", "4", "--max-steps", "4", "--learning-rate", "0.3", "--dtype", "float32", "--threads", "1"]
    for method, more in (("qlora", ["--lora-alpha", "64"]), ("prompt", ["--num-virtual-tokens", "4"])):
        tune = ["finetune", *files(tmp_path, "lm"), *common, "--method", method, *more, "--out", tmp_path / method]
        assert gptfast(*tune) == 0
    served = []
    monkeypatch.setattr(server, "run", lambda app, bound: served.append(app))
    named = [f"--adapter={method}={tmp_path / method / 'last'}" for method in ("qlora", "prompt")]
    packing = [] if quantize is None else ["--quantize", quantize]
    assert not gptfast("serve", "--model", tmp_path / "base", "--name", "pets", "--port", "0", *packing, *named)

    gpt = with_adapters(tmp_path / "base", [tmp_path / "qlora" / "last", tmp_path / "prompt" / "last"])
    model = gpt if quantize is None else gpt.compile_for_inference(quantize)
    tokenizer, names = load_tokenizer(tmp_path / "base"), ["pets", "pets:qlora", "pets:prompt"]
    ids = tokenizer.encode("the cat sat")
    with serving(served[0]) as url, concurrent.futures.ThreadPoolExecutor() as pool:
        assert [card["id"] for card in httpx.get(url + "/v1/models").json()["data"]] == names

        def ask(name):
            body = {"model": name, "prompt": "the cat sat", "max_tokens": 8, "temperature": 0, "logprobs": 0}
            return httpx.post(url + "/v1/completions", json=body, timeout=60).json()["choices"][0]

        said = list(pool.map(ask, names))
        for name, choice in zip(names, said, strict=True):
            (row,) = model.generate([ids], 8, adapter_names=[adapter_of(name)])
            assert choice["text"] == tokenizer.decode(row[len(ids) :])
        assert len({tuple(choice["logprobs"]["token_logprobs"]) for choice in said}) == 3
        chat = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4, "temperature": 0}
        for name in names:
            got = httpx.post(url + "/v1/chat/completions", json={"model": name, **chat}, timeout=60).json()
            assert got["model"] == name and got["usage"]["completion_tokens"] == 4


def with_adapters(folder, adapters):
    """A model with adapters, each under the name of its run."""
    from gptfast import GPT

    gpt = GPT.from_pretrained(folder).eval()
    for adapter in adapters:
        gpt.load_adapter(adapter, adapter.parent.name)
    return gpt


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_soft_prompt_is_served_and_takes_room(model, tokenizer, quantize):
    gpt = copy.deepcopy(model)
    gpt.add_adapter(PromptTuningConfig(20, prompt_tuning_init="RANDOM"), "hint")
    served = gpt if quantize is None else gpt.compile_for_inference(quantize)
    with serving(app_of(served, tokenizer)) as url:
        ask = {"model": "bard:hint", "prompt": "to be", "temperature": 0}
        got = httpx.post(url + "/v1/completions", json={**ask, "max_tokens": 9}).json()
        new = text_of(served, tokenizer, "bard:hint", "to be", max_new_tokens=9)
        assert got["choices"][0]["text"] == new != text_of(served, tokenizer, "bard", "to be", max_new_tokens=9)
        longest = httpx.post(url + "/v1/completions", json={**ask, "prompt": "a" * (BLOCK - 20 - 4)}).json()
        assert longest["usage"]["completion_tokens"] == 4, "what room there is, as without an adapter"
        refused = httpx.post(url + "/v1/completions", json={**ask, "max_tokens": BLOCK - 20}).json()["error"]
        assert refused["code"] == "context_length_exceeded" and f"is {BLOCK - 20} tokens" in refused["message"]
