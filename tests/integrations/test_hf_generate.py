"""generate of a patched model: transformers' tokens, by our runner where it can, and the reason where it cannot."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import gptfast
from gptfast.engine.runner import EngineRunner
from gptfast.integrations import hf_generate
from tests.support.hf_models import V, hf_model, padded

transformers = pytest.importorskip("transformers")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of the calls of gptfast.GPT.generate."""
    seen: list[dict[str, Any]] = []
    original = gptfast.GPT.generate
    monkeypatch.setattr(gptfast.GPT, "generate", lambda self, ids, **o: seen.append(o) or original(self, ids, **o))
    return seen


SAME_TEXT: dict[str, dict[str, Any]] = {
    "default": {},
    "greedy": {"max_new_tokens": 12},
    "max_length": {"max_length": 30},
    "ends": {"max_new_tokens": 30, "eos_token_id": list(range(3, 40)), "pad_token_id": 0},
    "an end that never comes": {"max_new_tokens": 8, "eos_token_id": 50256},
    "beams": {"max_new_tokens": 10, "num_beams": 4},
    "several beams": {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
    "early stopping": {
        "max_new_tokens": 12,
        "num_beams": 3,
        "early_stopping": True,
        "eos_token_id": list(range(3, 30)),
    },
    "repetition": {"max_new_tokens": 12, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "suppressed": {"max_new_tokens": 8, "suppress_tokens": list(range(5, 60))},
}


@pytest.mark.parametrize("options", SAME_TEXT.values(), ids=SAME_TEXT)
@pytest.mark.parametrize("sides", ["none", "left"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
def test_tokens_are_those_of_transformers(name: str, sides: str, options: dict[str, Any], calls: list[dict[str, Any]]):
    plain, patched = hf_model(name), hf_model(name)
    gptfast.accelerate(patched)
    ids, mask = padded(sides)
    call = {"attention_mask": mask, "pad_token_id": 0, **options}
    expected = plain.generate(ids, **call)
    assert torch.equal(patched.generate(ids, **call), expected) and len(calls) == 1
    assert torch.equal(patched.generate(input_ids=ids, **call), expected) and len(calls) == 2


def test_a_generation_config_and_the_models_own(calls: list[dict[str, Any]]):
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    ids, mask = padded("left")
    for model in (plain, patched):
        model.generation_config.max_new_tokens, model.generation_config.repetition_penalty = 7, 1.3
    expected = plain.generate(ids, attention_mask=mask)
    assert torch.equal(patched.generate(ids, attention_mask=mask), expected) and expected.shape[1] == ids.shape[1] + 7
    config = transformers.GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0)
    expected = plain.generate(ids, config, attention_mask=mask)
    assert torch.equal(patched.generate(ids, config, attention_mask=mask), expected)
    assert len(calls) == 2


def test_weights_that_change_count_whoever_writes_them(calls: list[dict[str, Any]]):
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    ids, _ = padded("none")
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    patched.generate(ids, **options)
    for change in ("copy_", "data", "load", "resize"):
        for model in (plain, patched):
            torch.manual_seed(hash(change) % 1000)
            weight = model.transformer.h[1].mlp.c_fc.weight
            with torch.no_grad():
                if change == "copy_":
                    weight.copy_(torch.randn_like(weight))
                elif change == "data":
                    weight.data = torch.randn_like(weight)
                elif change == "load":
                    model.load_state_dict({k: torch.randn_like(v) * 0.3 for k, v in model.state_dict().items()})
                    model.tie_weights()
                else:
                    model.resize_token_embeddings(V + 5, mean_resizing=False)
        assert torch.equal(patched.generate(ids, **options), plain.generate(ids, **options)), change
    assert len(calls) == 5


def test_draws_follow_set_seed(calls: list[dict[str, Any]]):
    model = hf_model()
    gptfast.accelerate(model)
    ids, _ = padded("none")
    texts = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        texts.append(model.generate(ids, do_sample=True, top_k=20, temperature=1.5, max_new_tokens=8, pad_token_id=0))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2]) and len(calls) == 3


def test_a_nucleus_of_any_size_that_transformers_takes(calls: list[dict[str, Any]]):
    """One of 0 keeps a token; from 1 on nothing is left out."""
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    ids, _ = padded("none")
    options = {"do_sample": True, "max_new_tokens": 4, "pad_token_id": 0, "top_k": 0}
    assert torch.equal(patched.generate(ids, top_p=0.0, **options), plain.generate(ids, top_p=0.0, **options))
    assert not calls
    assert patched.generate(ids, top_p=2.0, **options).shape == plain.generate(ids, top_p=2.0, **options).shape
    assert len(calls) == 1


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "min_new_tokens": ({"min_new_tokens": 4}, "min_new_tokens=4"),
    "bad words": ({"bad_words_ids": [[5]]}, "bad_words_ids"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "a processor": ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor is given"),
    "position ids": ({"position_ids": torch.arange(24).expand(3, -1)}, "position_ids is given"),
    "too long": ({"max_new_tokens": 50}, "50 new tokens after 24, in 64 positions"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_we_do_not_do_is_transformers_own(
    reason: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []
    monkeypatch.setattr(hf_generate._logger, "warning_once", told.append)
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    ids, _ = padded("none")
    options, expected = REASONS[reason]
    results = []
    for model in (plain, patched):
        try:
            results.append(model.generate(ids, **{"max_new_tokens": 5, "pad_token_id": 0, **options}))
        except (IndexError, ValueError) as error:
            results.append(type(error))
    if isinstance(results[0], torch.Tensor):
        assert torch.equal(results[0], results[1])
    else:
        assert reason == "scores" or results[0] == results[1]
    assert not calls and expected in told[0]


@pytest.mark.parametrize("change", ["hook", "hook without a name", "eps", "activation", "training", "adapter"])
def test_a_model_that_is_more_than_its_config_is_not_ours(
    change: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    told: list[str] = []
    monkeypatch.setattr(hf_generate._logger, "warning_once", told.append)
    model = hf_model(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    gptfast.accelerate(model)
    block = model.transformer.h[0]
    if change == "hook":
        block.register_forward_hook(lambda module, args, output: output * 2)
    elif change == "hook without a name":
        block.register_forward_hook(partial(lambda by, module, args, output: output * by, 2))
    elif change == "eps":
        block.ln_1.eps = 0.4
    elif change == "activation":
        block.mlp.act = torch.nn.ReLU()
    elif change == "training":
        model.train()
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    ids, _ = padded("none")
    got = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not calls and len(told) == 1
    with torch.no_grad():
        assert torch.equal(got[:, 24], model(input_ids=ids).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("order", ["patched first", "adapter first"])
def test_soft_prompts_of_peft_are_generated_with(config: str, order: str):
    """peft replaces a method of the model to put its prompt before the ids; our runner would not see it."""
    peft = pytest.importorskip("peft")
    ids, _ = padded("none")
    texts = []
    for patch in (False, True):
        model = hf_model()
        if patch and order == "patched first":
            gptfast.accelerate(model)
        torch.manual_seed(2)
        model = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data *= 3
        if patch and order == "adapter first":
            gptfast.accelerate(model)
        texts.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_a_streamer_hears_the_tokens(calls: list[dict[str, Any]]):
    class Streamer:
        def __init__(self) -> None:
            self.heard: list[int] = []

        def put(self, ids: torch.Tensor) -> None:
            self.heard += ids.flatten().tolist()

        def end(self) -> None:
            self.heard.append(-1)

    model, streamer = hf_model(), Streamer()
    gptfast.accelerate(model)
    ids, _ = padded("none")
    text = model.generate(ids[:1], max_new_tokens=5, streamer=streamer, pad_token_id=0)
    assert streamer.heard == [*text[0].tolist(), -1] and len(calls) == 1


def test_generate_false_leaves_it_to_transformers(calls: list[dict[str, Any]]):
    model = hf_model()
    gptfast.accelerate(model, generate=False)
    model.generate(padded("none")[0], max_new_tokens=3, pad_token_id=0)
    assert not calls


def test_a_text_that_repeats_itself_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch):
    plain, patched = hf_model(n_positions=256), hf_model(n_positions=256)
    gptfast.accelerate(patched)
    steps: list[int] = []
    original = EngineRunner.extend
    monkeypatch.setattr(
        EngineRunner,
        "extend",
        lambda self, slots, new, *last: steps.append(len(new[0])) or original(self, slots, new, *last),
    )
    ids = torch.arange(3, 7).repeat(3)[None]
    options = {"max_new_tokens": 200, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(patched.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)
    assert 8 in steps[1:] and len(steps) < 100
