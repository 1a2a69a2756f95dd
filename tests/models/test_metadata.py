"""What a checkpoint says beside its model: end tokens, defaults of generation and unknown keys, as transformers reads them."""

from __future__ import annotations

import json

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.backend import has_cpu_ops
from gptfast.cli import app
from gptfast.metadata import Metadata
from gptfast.tokenizer import BPETokenizer
from tests.support.command import run  # noqa: F401 (a fixture)

transformers = pytest.importorskip("transformers")

V = 300
GENERATION = {
    "eos_token_id": [7, 9],
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "max_new_tokens": 6,
}


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def theirs(folder, vocab_size=V, generation=None, **settings):
    """A checkpoint that transformers writes, whose greedy text is the id 5 for ever."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16, n_positions=32, tie_word_embeddings=False, **settings
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[5] = 1.0
    model.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


@pytest.mark.parametrize("eos", [0, V - 1, [3, 5], None])
def test_special_ids_and_unknown_keys_survive(tmp_path, eos):
    settings = {"eos_token_id": eos, "bos_token_id": 2, "pad_token_id": 4}
    theirs(tmp_path / "a", **settings, task_specific_params={"x": {"deep": [1, None]}}, n_ctx=32, my_own="é")
    before, generation = read(tmp_path / "a"), {"eos_token_id": [1, 2], "forced_bos_token_id": 9, "pad_token_id": 4}
    (tmp_path / "a/generation_config.json").write_text(json.dumps(generation))
    GPT.from_pretrained(tmp_path / "a", dropout=0.0).save_pretrained(tmp_path / "b")
    GPT.from_pretrained(tmp_path / "b", block_size=16).save_pretrained(tmp_path / "b")  # over itself, and shorter
    after = read(tmp_path / "b")
    changed = {"n_positions", "n_ctx", "embd_pdrop", "attn_pdrop", "resid_pdrop", "dtype"}
    assert {k: v for k, v in before.items() if k not in changed} == {k: after[k] for k in before if k not in changed}
    assert after["n_ctx"] == after["n_positions"] == 16
    assert read(tmp_path / "b", "generation_config.json") == generation
    config = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id, config.my_own) == (eos, 2, 4, "é")


def test_a_gpt2_has_its_context_by_the_older_name_too(tmp_path):
    """llama.cpp's convert_hf_to_gguf.py reads n_ctx alone, and stops without it."""
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=V, block_size=24)).save_pretrained(tmp_path / "a")
    GPT.from_pretrained(tmp_path / "a", block_size=8).save_pretrained(tmp_path / "b")
    for folder, context in (("a", 24), ("b", 8)):
        assert read(tmp_path / folder)["n_ctx"] == context
        assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / folder).config.n_positions == context


def test_a_model_built_here_replaces_the_settings_of_the_one_before(tmp_path):
    theirs(tmp_path, eos_token_id=3, generation={"eos_token_id": 4})
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=50257, block_size=8)).save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    assert read(tmp_path)["eos_token_id"] == read(tmp_path)["bos_token_id"] == 50256


@pytest.mark.parametrize(
    ("config_eos", "generation"), [(5, None), (3, {"eos_token_id": 5}), (3, {"eos_token_id": [8, 5]}), (3, {})]
)
def test_generate_ends_where_transformers_does(tmp_path, config_eos, generation):
    hf = theirs(tmp_path, eos_token_id=config_eos, pad_token_id=0, generation=generation)
    prompt = torch.tensor([[1, 2]])
    expected = hf.generate(prompt, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt))
    model = GPT.from_pretrained(tmp_path)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, temperature=0.0), expected)
    assert model.generate(prompt, max_new_tokens=4, temperature=0.0, eos_token_id=None).shape == (1, 6)
    assert model.generate(prompt, max_new_tokens=4, temperature=0.0, eos_token_id=3).shape == (1, 6)


@pytest.mark.skipif(not has_cpu_ops, reason="needs the compiled engine")
def test_compiled_models_and_their_files_keep_end_tokens(tmp_path):
    from gptfast import engine

    theirs(tmp_path / "m", eos_token_id=[5, 6], generation={"eos_token_id": 7, "temperature": 0.5})
    compiled = GPT.from_pretrained(tmp_path / "m").compile_for_inference("float32")
    compiled.save(tmp_path / "file")
    for model in (compiled, compiled.with_threads(1), engine.load(tmp_path / "file")):
        assert model.metadata.end_tokens(V) == (7, 5, 6) and model.metadata.defaults() == {"temperature": 0.5}
        assert model.generate([[1]], max_new_tokens=4, temperature=0.0) == [[1, 5]]


def test_the_union_leaves_out_what_is_no_token():
    metadata = Metadata({"eos_token_id": [4, 50256]}, {"eos_token_id": [-1, 4, 2]})
    assert metadata.end_tokens(100, [7, None]) == (4, 2, 7)
    assert metadata.end_tokens(50257) == (4, 2, 50256)
    assert Metadata(generation={"do_sample": False, "top_k": 9, "temperature": None}).defaults() == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("generation_config.json", "[1]", "JSON object"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id is '</s>'; expected a token id"),
        ("generation_config.json", '{"top_k": 1.5}', "top_k is 1.5; expected"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature is 'hot'; expected"),
        ("generation_config.json", '{"max_new_tokens": 0}', "max_new_tokens is 0; expected"),
        ("generation_config.json", "{", "not valid JSON"),
        ("config.json", None, "eos_token_id is True; expected a token id"),
    ],
)
def test_damaged_settings_are_named(tmp_path, file, content, match):
    theirs(tmp_path)
    (tmp_path / file).write_text(content or json.dumps({**read(tmp_path), "eos_token_id": True}))
    with pytest.raises(ValueError, match=match) as error:
        GPT.from_pretrained(tmp_path)
    assert file in str(error.value)


# ---- in the commands ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose tokenizer ends at 256, config.json at 5, and generation_config.json at 7 and 9."""
    path = tmp_path_factory.mktemp("m")
    tokenizer = BPETokenizer.from_merges([("a", "b")])
    theirs(path, tokenizer.vocab_size, eos_token_id=5, generation=GENERATION)
    tokenizer.save(path)
    return path


def test_info_shows_end_tokens_and_defaults(folder, capsys):
    with pytest.raises(SystemExit):
        app(["info", str(folder)])
    out = " ".join(capsys.readouterr().out.split())
    assert "end tokens: 7, 9, 5" in out
    assert "max_new_tokens 6, temperature 0.5, top_k 3, top_p 0.9" in out


def test_generate_takes_the_defaults_and_ends(folder, run, monkeypatch, tmp_path):  # noqa: F811
    seen = []

    def stream(model, ids, **options):
        seen.append(options)
        return iter(())

    code, out, err = run("--model", folder, "--prompt", "ab", "--show-probabilities")
    assert code == 0 and "1: " in out and "2: " not in out, err  # the id 5 ends it
    code, out, err = run("--model", folder, "--prompt", "ab", "--num-return-sequences", 2)
    assert code == 0 and out.count("ab\n") == 2 and err.startswith("2 tokens"), err  # an end token is not shown
    monkeypatch.setattr("gptfast.generation.stream", stream)
    for args in ((), ("--temperature", "0.9", "--top-k", "0", "--max-new-tokens", "2")):
        assert run("--model", folder, "--prompt", "ab", *args)[0] == 0
    wanted = {"eos_token_id": [7, 9, 5, 257], "temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_new_tokens": 6}
    assert {name: seen[0][name] for name in wanted} == wanted
    assert [seen[1][name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")] == [0.9, 0, 0.9, 2]

    lines = ['"ab"', '{"prompt": "ab", "num_beams": 2}', '{"prompt": "ab", "do_sample": false, "max_new_tokens": 3}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    code, _, err = run("--model", folder, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert code == 0, err
    drawn, beams, greedy = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert drawn["options"]["top_k"] == 3 and drawn["completions"] == [
        {"text": "", "finish_reason": "stop", "tokens": 1}
    ]
    assert "top_k" not in beams["options"] and beams["completions"][0]["tokens"] == 1
    assert "temperature" not in greedy["options"] and greedy["options"]["max_new_tokens"] == 3


def test_serve_takes_the_defaults_and_ends(folder):
    pytest.importorskip("fastapi")
    from gptfast.serving.app import Limits
    from gptfast.serving.protocol import Completion
    from gptfast.serving.service import Service
    from gptfast.tokenizer import load_tokenizer

    model = GPT.from_pretrained(folder)
    server = Service(model, model.runner(1, 1), load_tokenizer(folder), "m", Limits(), None)

    def config_of(**ask):
        ask = Completion(model="m", prompt="ab", **ask)
        return ask.request([1, 2], server.tokenizer, 20, server.seeds, server.defaults).config

    got = config_of()
    assert (got.eos_ids, got.max_new_tokens) == ((7, 9, 5, 257), 6)
    assert (got.temperature, got.top_k, got.top_p) == (0.5, 3, 0.9)
    got = config_of(temperature=1.5, top_k=0, max_tokens=2)
    assert (got.temperature, got.top_k, got.top_p, got.max_new_tokens) == (1.5, 0, 0.9, 2)
