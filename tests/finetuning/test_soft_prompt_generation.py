"""Generation under soft prompts in the engine and in torch, caches, and the room that a prompt takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gptfast
from gptfast.finetuning import LoraConfig, PromptTuningConfig
from gptfast.generation import TorchRunner, score

CONFIG = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 0, 60, 4]]


@pytest.fixture(params=["auto", "eager"])  # the native engine, and torch
def gpt(request: pytest.FixtureRequest) -> Iterator[gptfast.GPT]:
    torch.manual_seed(0)
    gpt = gptfast.GPT(CONFIG).eval()
    gpt.add_adapter(LoraConfig(target_modules=["c_attn"], init_lora_weights=False), "lora")
    for name, n in (("long", 9), ("short", 4)):
        gpt.add_adapter(PromptTuningConfig(n, prompt_tuning_init="RANDOM"), name)
    with gptfast.backend(request.param):
        assert isinstance(gpt.runner(1, 8), TorchRunner) == (request.param == "eager")
        yield gpt


def continued(gpt: gptfast.GPT, prompt: list[int], count: int) -> list[int]:
    """Greedily, by whole forwards without a cache."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat((ids, gpt(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids[0].tolist()


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 1, "max_new_tokens": 1}])
def test_generate_puts_the_prompt_before_every_text(gpt: gptfast.GPT, options: dict[str, Any]):
    count = options.get("max_new_tokens", 10)
    for names in ("long", "short", ["lora", "short"]):
        gpt.set_adapter(names)
        texts = gpt.generate(PROMPTS, **{"max_new_tokens": count, **options})
        assert texts == [continued(gpt, prompt, count) for prompt in PROMPTS]
    gpt.disable_adapters()
    bare = gpt.generate(PROMPTS, count, **{k: v for k, v in options.items() if k != "max_new_tokens"})
    assert bare == [continued(gpt, prompt, count) for prompt in PROMPTS]
    assert bare != texts or count == 1


@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "seed": 4}, {"num_beams": 2}]
)
def test_prompts_under_different_adapters(gpt: gptfast.GPT, options: dict[str, Any]):
    names = ["long", "__base__", "short", "lora", "short"]
    prompts = [*PROMPTS, [1, 2], [6]]
    texts = gpt.generate(prompts, 10, adapter_names=names, **options)
    for text, prompt, name in zip(texts, prompts, names, strict=True):
        gpt.enable_adapters()
        assert [text] == gpt.generate([prompt], 10, adapter_names=[name], **options)
        gpt.disable_adapters() if name == "__base__" else gpt.set_adapter(name)
        assert [text] == gpt.generate([prompt], 10, **options)
        assert options or text == continued(gpt, prompt, 10)
    assert score(gpt, texts[0], adapter="short") == score(gpt, texts[0])  # the active one
    with pytest.raises(ValueError, match="adapter_names has 1 names and the batch 5 rows"):
        gpt.generate(prompts, 10, adapter_names=["long"])
    with pytest.raises(ValueError, match="adapter_names has 'no'"):
        gpt.generate(PROMPTS[:1], 10, adapter_names=["no"])


def test_each_row_has_the_room_that_its_prompt_leaves(gpt: gptfast.GPT):
    rows = [[1] * 22, [2] * 27, [3] * 31]
    texts = gpt.generate(rows, 1, adapter_names=["long", "short", "__base__"])
    assert [len(text) for text in texts] == [23, 28, 32]
    with pytest.raises(ValueError, match=r"prompt 1 has 28 tokens .* block_size is 32, of which a soft prompt takes 4"):
        gpt.generate([rows[0], [2] * 28], 1, adapter_names=["long", "short"])
    slid = gpt.generate([rows[0][:3], [5]], 40, adapter_names=["long", "__base__"], overflow="slide")
    gpt.set_adapter("long")
    assert slid[0] == gpt.generate([rows[0][:3]], 40, overflow="slide")[0]
    gpt.disable_adapters()
    assert slid[1] == gpt.generate([[5]], 40, overflow="slide")[0]
    gpt.enable_adapters()
    scheduler = gptfast.generation.Scheduler(gpt, 2)
    assert scheduler.submit([1] * 22, max_new_tokens=1, adapter="long").max_len == 23
    with pytest.raises(ValueError, match="block_size is 32, of which a soft prompt takes 9"):
        scheduler.submit([1] * 23, max_new_tokens=1, adapter="long")
    assert scheduler.submit([1] * 31, max_new_tokens=1, adapter="__base__").max_len == 32


def test_beams_copies_and_scores(gpt: gptfast.GPT):
    found = gpt.generate(PROMPTS, 6, num_beams=3, num_return_sequences=2, return_logprobs=True, length_penalty=0.0)
    for text, logprobs, total in zip(found.sequences, found.logprobs, found.scores, strict=True):
        ids = torch.tensor([text])
        own = gpt(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), own[-6:].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(total), own[-6:].sum().detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(score(gpt, text)), own.detach(), rtol=1e-4, atol=1e-5)
    drawn = gpt.generate(PROMPTS, 6, do_sample=True, seed=3, num_return_sequences=2)
    assert drawn[:2] == gpt.generate(PROMPTS[:1], 6, do_sample=True, seed=3, num_return_sequences=2)


def test_a_prompt_takes_room(gpt: gptfast.GPT):
    gpt.set_adapter("long")
    assert len(gpt.generate([[1, 2, 3]], 20)[0]) == 23 == len(gpt.generate([[1, 2, 3]])[0])
    said = r"prompt 0 has 3 tokens and max_new_tokens is 21, together 24, but block_size is 32, of which a soft prompt takes 9"
    with pytest.raises(ValueError, match=said):
        gpt.generate([[1, 2, 3]], 21)
    with pytest.raises(ValueError, match="expected 2 to 24 tokens"):
        score(gpt, list(range(25)))
    assert len(score(gpt, list(range(24)))) == 23
    slid = gpt.generate([[1, 2, 3]], 40, overflow="slide")[0]
    assert len(slid) == 43 and slid[:23] == gpt.generate([[1, 2, 3]], 20)[0]
    runner = gpt.runner(1, 32)
    with pytest.raises(ValueError, match="24 more do not fit into max_len = 23"):
        runner.extend(runner.allocate(), [[1] * 24])


def test_slots_keep_their_virtual_tokens(gpt: gptfast.GPT):
    """One that is freed gives its place to the last; a text of one token begins beside others that go on."""
    texts = {"long": [1, 2, 3, 4, 5, 6], "short": [7, 8, 9, 1, 2, 3], "lora": [5, 5, 5, 5, 5, 5]}
    runner, whole = gpt.runner(3, 8), {n: gpt(torch.tensor([ids]), adapter_names=[n])[0] for n, ids in texts.items()}
    (first,), (long,) = runner.allocate(1, "lora"), runner.allocate(1, "long")
    runner.extend([first, long], [[1, 2], texts["long"][:4]])
    runner.free(first)
    (short,) = runner.allocate(1, "short")
    for n in (0, 1):
        logits = runner.extend([long, short], [[texts["long"][4 + n]], [texts["short"][n]]])
        expected = torch.stack([whole["long"][4 + n], whole["short"][n]])
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-5)
    assert [runner.lengths[slot] for slot in (long, short)] == [6, 2]


def test_a_cache_holds_the_prompts_of_its_rows(gpt: gptfast.GPT):
    ids, names = torch.arange(3 * 12).view(3, 12) % 61, ["long", "__base__", "short"]
    whole = gpt(ids, adapter_names=names)
    cache = gptfast.models.KVCache(CONFIG, 3)
    parts = [gpt(ids[:, a:b], adapter_names=names, cache=cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [12, 12, 12]
    cache.lengths = torch.tensor([6, 12, 0])
    with pytest.raises(
        ValueError, match=r"cache has rows of \[6, 12, 0\] tokens; a row without tokens gets its soft prompt"
    ):
        gpt(ids[:, :1], adapter_names=names, cache=cache)
    cache.lengths = torch.tensor([6, 10, 8])
    again = gpt(torch.stack([ids[0, 6], ids[1, 10], ids[2, 8]])[:, None], adapter_names=names, cache=cache)
    expected = torch.stack([whole[0, 6], whole[1, 10], whole[2, 8]])[:, None]
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    small = gptfast.models.KVCache(CONFIG, 3, 16)
    with pytest.raises(ValueError, match="0 positions are filled and 21 more do not fit into max_len = 16"):
        gpt(ids, adapter_names=names, cache=small)
