"""Random mixtures of strategies: token for token those of transformers, and the same by every way of computing them."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

from gptfast.backend import has_cpu_ops
from gptfast.generation import generate, stream
from tests.support.generation_pairs import make_pair
from tests.support.strategies import without_padding

transformers = pytest.importorskip("transformers")

PAD = 0  # comes after end tokens only
SIZES = [(3, 24), (17, 8), (61, 48)]  # vocabulary, block size
IMPOSSIBLE = -1e8  # transformers fills up with sequences that cannot be; we with others, at -inf


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    @functools.cache
    def pair(kind, size, layers):
        return make_pair(kind, tmp_path_factory.mktemp(kind), *size, layers=layers)

    return pair


def random_prompts(r, V, block):
    return [
        [r.randrange(V) for _ in range(r.choice([1, 2, block // 2, block - 2]))] for _ in range(r.choice([1, 2, 4]))
    ]


def random_options(r, V, room) -> dict[str, Any]:
    some: dict[str, Any] = {"max_new_tokens": r.randint(1, room)}
    if r.random() < 0.4:
        some["repetition_penalty"] = r.choice([0.5, 1.1, 2.0])
    if r.random() < 0.3 and V > 3:  # or nothing is left to choose
        some["no_repeat_ngram_size"] = r.randint(2, 4)
    if r.random() < 0.4:
        some["logit_bias"] = {r.randrange(V): r.choice([-5.0, 2.0, 3.7]) for _ in range(2)}
    if r.random() < 0.6:
        some["eos_token_id"] = r.choice([r.randrange(V), sorted({r.randrange(V) for _ in range(2)})])
    return some


def random_beams(r):
    K = r.randint(2, 5)
    return {
        "num_beams": K,
        "num_return_sequences": r.randint(1, K),
        "length_penalty": r.choice([-2.0, -0.5, 0.0, 0.3, 1.0, 2.0, 5.0]),
        "early_stopping": r.choice([True, False, "never"]),
    }


def theirs(model, prompt, options):
    """(new tokens, score) of each sequence; [] where transformers meets an error of its own."""
    options = dict(options)
    if bias := options.pop("logit_bias", None):
        options["sequence_bias"] = [[[token], value] for token, value in bias.items()]
    eos, ids = options.get("eos_token_id"), torch.tensor([prompt])
    told = {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": PAD}
    try:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **told, **options)
    except RuntimeError:  # more candidates than there are tokens
        return []
    scores = out.sequences_scores.tolist() if "num_beams" in options else [0.0]
    rows = [without_padding(row[len(prompt) :], eos) for row in out.sequences.tolist()]
    return list(zip(rows, scores, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_greedy_and_beams_equal_transformers(pair_of, seed):
    r = random.Random(seed)
    V, block = size = r.choice(SIZES)
    their_model, model = pair_of(r.choice(["gpt2", "openai-gpt"]), size, r.choice([1, 2]))
    prompts = random_prompts(r, V, block)
    options = random_options(r, V, block - max(map(len, prompts))) | (random_beams(r) if r.random() < 0.7 else {})
    expected = [theirs(their_model, prompt, options) for prompt in prompts]
    for write in (model.generate, functools.partial(generate, model)):
        rows, copies = iter(write(prompts, do_sample=False, **options)), options.get("num_return_sequences", 1)
        for prompt, found in zip(prompts, expected, strict=True):
            ours = [next(rows)[len(prompt) :] for _ in range(copies)]
            if any(score < IMPOSSIBLE for _, score in found):
                continue
            assert not found or ours == [new for new, _ in found], (options, prompt)


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
@pytest.mark.parametrize("seed", range(24))
def test_no_way_of_computing_changes_a_token(pair_of, seed):
    """The engine, the loop over a GPT, any batch, and guesses that are checked: drawn or greedy, also past the block."""
    r = random.Random(seed)
    V, block = size = r.choice(SIZES)
    model, other = (pair_of("gpt2", size, layers)[1] for layers in (2, 1))
    prompts = random_prompts(r, V, block)
    options = random_options(r, V, block - max(map(len, prompts)))
    options |= {"seed": r.choice([0, 7, 2**64 - 1]), "num_return_sequences": r.choice([1, 3])}
    options |= r.choice([{"temperature": 0}, {"top_p": 0.9}, {"top_k": 1000}, {"min_p": 0.1, "temperature": 3.0}])
    options |= {"overflow": "slide", "max_new_tokens": 40} if r.random() < 0.3 else {}
    expected, engine = generate(model, prompts, **options), model.compile_for_inference("float32")
    guesses = [{"prompt_lookup_num_tokens": r.choice([1, 9])}, {"assistant_model": other, "num_assistant_tokens": 3}]
    for one in (model, engine):
        assert one.generate(prompts, **options) == expected
        assert [row for prompt in prompts for row in one.generate([prompt], **options)] == expected
        for guess in guesses:
            assert generate(one, prompts, **guess, **options) == expected
    steps, copies = list(stream(engine, prompts, **options)), options["num_return_sequences"]
    told = [[step.tokens[n] for step in steps if step.tokens[n] is not None] for n in range(len(expected))]
    assert [prompts[n // copies] + new for n, new in enumerate(told)] == expected
