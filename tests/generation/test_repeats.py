"""draft_repeats: guesses where a single text repeats itself. The same text in fewer steps, and few guesses that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gptfast
from gptfast.backend import has_cpu_ops
from gptfast.generation import GenerationConfig, generate
from gptfast.generation.sampling import SamplingContext
from gptfast.generation.speculative import LONGEST_DRAFT, Repeats

V = 61
needs_engine = pytest.mark.skipif(not has_cpu_ops, reason="needs the native engine")


@pytest.fixture(scope="module")
def model() -> gptfast.GPT:
    torch.manual_seed(0)
    return gptfast.GPT(gptfast.GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=256, vocab_size=V)).eval()


class Watched:
    """A language model that notes how many tokens each call of `extend` appends to the first slot, the prompt apart."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.appended = model, model.config, []

    def runner(self, max_slots: int, max_len: int) -> Any:
        runner = self.model.runner(max_slots, max_len)
        extend = runner.extend

        def noted(slots: Any, tokens: Any, last_only: bool = True) -> Any:
            self.appended.append(len(tokens[0]))
            return extend(slots, tokens, last_only)

        runner.extend = noted
        return runner


@needs_engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q4"])
@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"seed": 3, "temperature": 0.05}], ids=str)
def test_the_text_is_the_same(model: gptfast.GPT, dtype: str, options: dict[str, Any]):
    compiled = model.compile_for_inference(dtype)
    for prompt in ([5], [1, 2, 3, 1, 2, 3, 1, 2], list(range(40))):
        watched = Watched(compiled)
        call: dict[str, Any] = {"max_new_tokens": 200, **options}
        expected = generate(compiled, [prompt], **call)
        assert generate(watched, [prompt], draft_repeats=True, **call) == expected
        if "seed" not in options:  # an untrained model repeats itself
            assert max(watched.appended[1:]) == 1 + LONGEST_DRAFT


@needs_engine
def test_ends_are_met_inside_a_draft(model: gptfast.GPT):
    compiled = model.compile_for_inference("float32")
    text = generate(compiled, [[5]], max_new_tokens=120)[0]
    for length in range(90, 110):
        assert generate(compiled, [[5]], max_new_tokens=length, draft_repeats=True)[0] == text[: 1 + length]
    bias = {7: 3.0}
    plain = generate(compiled, [[5]], max_new_tokens=120, seed=1, temperature=0.3, logit_bias=bias, eos_token_id=7)
    call: dict[str, Any] = {"seed": 1, "temperature": 0.3, "logit_bias": bias, "eos_token_id": 7, "draft_repeats": True}
    assert generate(compiled, [[5]], max_new_tokens=120, **call) == plain


@pytest.mark.parametrize("case", ["torch", "two prompts", "two texts", "not asked for"])
def test_who_gets_no_drafts(model: gptfast.GPT, case: str):
    """Matrix libraries round otherwise for more rows, and rows that are computed together share no longer one read."""
    if case != "torch" and not has_cpu_ops:
        pytest.skip("needs the native engine")
    prompts = [[5], [6]] if case == "two prompts" else [[5]]
    options = {"num_return_sequences": 2, "seed": 0, "temperature": 0.01} if case == "two texts" else {}
    with gptfast.backend("eager"):
        watched = Watched(model if case == "torch" else model.compile_for_inference("float32"))
        generate(watched, prompts, max_new_tokens=60, draft_repeats=case != "not asked for", **options)
    assert set(watched.appended) == {1}


def test_wrong_guesses_become_rare():
    """A text in which three tokens often come again, followed by another each time."""
    repeats, config, guesses = Repeats(), GenerationConfig(), 0
    tokens = [1, 2, 3]
    for n in range(200):
        guesses += bool(repeats.propose([0], [SamplingContext(config, 0, tokens, 1)], [LONGEST_DRAFT])[0])
        tokens += [10 + n, 1, 2, 3]
    assert 0 < guesses < 30


def test_guesses_begin_again_and_grow_where_they_are_right():
    repeats, config, lengths = Repeats(), GenerationConfig(), []
    tokens = [4, 5] * 3
    for _ in range(3):
        draft = repeats.propose([0], [SamplingContext(config, 0, tokens, 1)], [LONGEST_DRAFT])[0]
        assert draft == ([4, 5] * LONGEST_DRAFT)[: len(draft)]
        tokens, lengths = [*tokens, *draft, tokens[-2 + len(draft) % 2]], [*lengths, len(draft)]
    assert lengths == [3, LONGEST_DRAFT, LONGEST_DRAFT]
    repeats.free(0)
    assert len(repeats.propose([0], [SamplingContext(config, 0, [4, 5] * 3, 1)], [LONGEST_DRAFT])[0]) == 3
