"""A vocabulary padded for speed: ids without text are never chosen unless asked for, and never end a text, a file or a
request."""

from __future__ import annotations

import json
import math

import pytest
import torch

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.batch import read_jobs, run_jobs
from gptfast.generation import Scheduler, generate, stream
from gptfast.generation.config import GenerationConfig
from gptfast.generation.textless import choosing_text, textless_ids
from gptfast.serving.app import Limits, create_app
from gptfast.tokenizer import BPETokenizer, StreamDecoder, lenient
from tests.support.captured import captured_tokens
from tests.support.serving_app import openai, serving

V, TOKENS = 320, 300  # half of the steps would take one of the 20
HOT = {"temperature": 5.0, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    trained = BPETokenizer.train("the cat sat on the mat, that is that; then the other cat ran on. " * 9, TOKENS)
    specials = {f"<|{n}|>": trained.vocab_size + n for n in range(TOKENS - trained.vocab_size)}
    padded = BPETokenizer({**trained.vocab, **specials}, trained.merges)
    assert padded.vocab_size == TOKENS
    return padded


@pytest.fixture(scope="module")
def holes(tokenizer) -> BPETokenizer:
    """Other ids without text: every special token at an odd id is missing, and the rest ends at the same place."""
    missing = {i for token, i in tokenizer.specials.items() if i % 2 and token != "<|endoftext|>"} - {TOKENS - 1}
    kept = {token: i for token, i in tokenizer.vocab.items() if i not in missing}
    assert len(missing) >= 3
    return BPETokenizer(kept, tokenizer.merges)


@pytest.fixture(scope="module")
def model() -> GPT:
    """One that likes ids without text."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=V, dropout=0.0, tie_weights=False))
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        model.lm_head.weight[TOKENS:].mul_(2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("padded")
    model.save_pretrained(path)
    tokenizer.save(path)
    return str(path)


WAYS = {
    "greedy": {"temperature": 0},
    "hot": {**HOT, "num_return_sequences": 4},
    "cut": {**HOT, "top_k": 40, "top_p": 0.95, "seed": 2},
    "min_p": {**HOT, "min_p": 0.001},
    "penalties": {**HOT, "repetition_penalty": 1.4, "presence_penalty": 0.5, "no_repeat_ngram_size": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "drawn beams": {"num_beams": 4, "do_sample": True, **HOT},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "lookup": {"temperature": 0, "prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("which", ["tokenizer", "holes"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_ids_without_text_are_never_chosen(model, way, backend, which, request) -> None:
    known, prompts = request.getfixturevalue(which), [[5, 6, 7], [70]]
    options = {"max_new_tokens": 24, **WAYS[way]}
    with gptfast.backend(backend):
        free = model.generate(prompts, **options)
        rows = model.generate(prompts, tokenizer=known, **options)
        assert model.generate(prompts, **options) == free, "without a tokenizer nothing is forbidden"
    assert any(not known.has_token(token) for row in free for token in row), "nothing is tested"
    assert all(known.has_token(token) for row in rows for token in row)
    assert all(isinstance(known.decode(row), str) for row in rows)


@pytest.mark.parametrize("which", ["tokenizer", "holes"])
def test_the_draw_is_that_of_banned_ids(model, which, request) -> None:
    """In calls of several tokens, one at a time, and in torch: the tokens of the same model with -inf at these ids."""
    known = request.getfixturevalue(which)
    bans = {"logit_bias": dict.fromkeys(textless_ids(known, V), -math.inf)}
    for options in ({"temperature": 0}, HOT, {**HOT, "top_k": 9, "seed": 4}, {**HOT, "top_p": 0.7, "seed": 5}):
        expected = model.generate([[5, 6, 7]], max_new_tokens=20, **options, **bans)
        assert model.generate([[5, 6, 7]], max_new_tokens=20, tokenizer=known, **options) == expected
        scheduler = Scheduler(model)
        asked = scheduler.submit([5, 6, 7], tokenizer=known, max_new_tokens=20, **options)
        beside = scheduler.submit([5, 6, 7], max_new_tokens=20, **options)  # of another vocabulary, in the same steps
        while scheduler.waiting or scheduler.running:
            scheduler.step(4)
        assert asked.sequences[0].tokens == expected[0]
        assert beside.sequences[0].tokens == model.generate([[5, 6, 7]], max_new_tokens=20, **options)[0]
        with gptfast.backend("eager"):
            steps = stream(model, [[5, 6, 7]], tokenizer=known, max_new_tokens=20, **options)
            assert [step.tokens[0] for step in steps] == expected[0][3:]


def test_captured_steps(model) -> None:
    for options in ({"temperature": 0.0}, {**HOT, "seed": 3, "top_k": 30}):
        expected = generate(model, [[5, 6, 7], [8]], max_new_tokens=20, usable_vocab=TOKENS, **options)
        assert captured_tokens(model, [[5, 6, 7], [8]], max_new_tokens=20, usable_vocab=TOKENS, **options) == expected


def test_an_assistant_and_its_model(model, tokenizer) -> None:
    options = {"max_new_tokens": 20, "tokenizer": tokenizer, **HOT}
    assert model.generate([[5, 6, 7]], assistant_model=model, **options) == model.generate([[5, 6, 7]], **options)


def test_what_is_asked_for(tokenizer) -> None:
    """A positive bias, or an end token, is asked for; a negative bias is not."""
    plain = choosing_text(GenerationConfig(), tokenizer, V)
    assert (plain.usable_vocab, plain.suppress_tokens) == (TOKENS, None)
    asked = GenerationConfig(logit_bias={310: 5.0, 311: -5.0}, eos_token_id=302, suppress_tokens=[3])
    config = choosing_text(asked, tokenizer, V)
    assert config.usable_vocab == 311
    assert config.suppress_tokens == (3, 300, 301, *range(303, 310))
    assert choosing_text(GenerationConfig(), tokenizer, TOKENS) == GenerationConfig(), "a vocabulary that fits"
    assert choosing_text(GenerationConfig(), object(), V) == GenerationConfig(), "a tokenizer that cannot tell"


def test_one_that_is_asked_for_has_no_text(model, tokenizer) -> None:
    options = {"logit_bias": {310: 1000.0}, "max_new_tokens": 9, "stop_strings": ["zz"]}
    (row,) = model.generate([[5, 6]], tokenizer=tokenizer, **options)
    assert row == [5, 6] + [310] * 9
    soft = lenient(tokenizer)
    assert soft.decode(row) == tokenizer.decode([5, 6]) and lenient(soft) is soft
    decoder = StreamDecoder(soft)
    assert "".join(map(decoder.push, row)) + decoder.finish() == tokenizer.decode([5, 6])
    with pytest.raises(ValueError, match="id 310 has no token"):
        tokenizer.decode(row)


def test_a_stop_string_around_an_id_without_text(model, tokenizer) -> None:
    from gptfast.generation.stopping import Stopping

    (first, second, *_), stop = tokenizer.encode("zq"), "zq"
    stopping = Stopping(GenerationConfig(stop_strings=stop), tokenizer)
    assert stopping.reason([first, *[310] * 5, second]) == "stop"
    assert stopping.reason([first, *[310] * 5]) is None


def test_the_options_themselves(model) -> None:
    for options, text in (
        ({"suppress_tokens": [V]}, f"suppress_tokens holds {V}; expected ids in"),
        ({"suppress_tokens": [-1]}, "a token of suppress_tokens is -1; expected at least 0"),
        ({"usable_vocab": V + 1}, f"usable_vocab is {V + 1}; expected at most {V}"),
        ({"usable_vocab": -1}, "usable_vocab is -1; expected at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            model.generate([[1]], max_new_tokens=1, **options)
    with pytest.raises(TypeError, match="suppress_tokens is 3; expected a list"):
        model.generate([[1]], max_new_tokens=1, suppress_tokens=3)
    free = model.generate([[1]], max_new_tokens=9, temperature=0)[0]
    assert set(free[1:]).isdisjoint(model.generate([[1]], max_new_tokens=9, temperature=0, suppress_tokens=free)[0][1:])


# ---- command line, files, server ------------------------------------------------------------------------------------


def test_command_line(folder, run) -> None:
    hot = ("--model", folder, "--temperature", 5, "--max-new-tokens", 40)
    for seed in range(3):
        code, out, err = run(*hot, "--prompt", "the cat", "--seed", seed)
        assert code == 0 and out.startswith("the cat") and "40 tokens" in err
    for more in (("--num-return-sequences", 3), ("--prompt", "then"), ("--stop", "zzzz"), ("--show-probabilities",)):
        code, out, err = run(*hot, "--prompt", "the cat", *more)
        assert code == 0, err
        assert "has no token" not in out + err
    code, out, err = run("--model", folder, "--num-beams", 4, "--max-new-tokens", 20, "--prompt", "the cat")
    assert code == 0, err


def test_a_file_of_prompts(folder, model, tokenizer, run, tmp_path) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    bans = dict.fromkeys(map(str, range(V)), -math.inf)
    lines = [
        *({"prompt": "the cat", "seed": n, **HOT} for n in range(6)),
        {"prompt": "then", "logit_bias": {"310": 100}},
        {"prompt": "on", "num_beams": 3},
        {"prompt": "that", "num_beams": 3, "logit_bias": bans},  # nothing left to choose
        {"prompt": "mat"},
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    code, _, err = run("--model", folder, "--input", source, "--output", output, "--max-new-tokens", 30)
    assert code == 0, err
    results = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [result["line"] for result in results] == list(range(1, 11))
    assert ["error" in result for result in results] == [False] * 8 + [True, False]
    assert all(len(result["completions"]) == 1 for result in results if "error" not in result)
    assert results[6]["completions"][0] == {"text": "", "finish_reason": "length", "tokens": 30}
    run_jobs(read_jobs(source, model, tokenizer, {"max_new_tokens": 30}), tmp_path / "direct.jsonl", model, tokenizer)


def test_server(model, tokenizer) -> None:
    app = create_app(model, tokenizer, "padded", Limits(max_rows=8))
    with serving(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:

        def ask(**options):
            options = {"prompt": "the cat", "max_tokens": 30, "temperature": 2.0, **options}
            return client.completions.create(model="padded", **options)

        for seed in range(4):
            answer = ask(seed=seed, logprobs=20, echo=bool(seed % 2))
            (choice,), usage = answer.choices, answer.usage
            assert len(choice.logprobs.tokens) == usage.completion_tokens + (seed % 2) * usage.prompt_tokens
            assert "" not in choice.logprobs.tokens
            assert all("" not in top for top in choice.logprobs.top_logprobs if top is not None)
        assert len(ask(n=4, prompt=["the", "on"]).choices) == 8
        assert "".join(chunk.choices[0].text for chunk in ask(stream=True, seed=1)) == ask(seed=1).choices[0].text
        assert ask(logit_bias={"310": 100}, temperature=0.5).choices[0].text == ""
        own = ask(prompt=[5, 310, 6], echo=True, logprobs=2, max_tokens=3).choices[0]
        assert own.text.startswith(tokenizer.decode([5, 6])) and own.logprobs.tokens[1] == ""
