"""Temperatures so low that logits / temperature is beyond the range of fp32: the most likely token, as in greedy search."""

from __future__ import annotations

import pytest
import torch

import gptfast
from gptfast.generation import GenerationConfig, stream
from gptfast.generation.sampling import SamplingContext, choose, probabilities, sample_rows

LOW = (1e-37, 1e-39, 1e-320)  # the second is denormal in fp32, the third is 0 there


@pytest.fixture(scope="module")
def model():
    """Its logits reach to 100."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"vocab_size": 50, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
        model = gptfast.GPT(gptfast.GPTConfig(**shape)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(5)
            found = model(torch.tensor([[1, 2, 3]]))
            model.lm_head.weight.mul_(100 / found.abs().max())
    return model


@pytest.mark.parametrize("temperature", LOW)
@pytest.mark.parametrize("cuts", [{"min_p": 0.1}, {"min_p": 0.1, "top_k": 4, "top_p": 0.9}, {"top_p": 0.9}], ids=str)
def test_the_most_likely_token_is_drawn(temperature, cuts):
    """Under min_p all quotients of inf were equally likely, and the first was taken."""
    config = GenerationConfig(temperature=temperature, seed=0, **cuts)
    logits = torch.tensor([[40.0, 3.0, 90.0, 89.0, -5.0]])
    assert choose(logits, [SamplingContext(config, 0, [1], 1)], sample_rows) == [2]


@pytest.mark.parametrize("temperature", LOW)
def test_probabilities_are_one_and_zeros(model, temperature):
    """They were nan."""
    [greedy] = model.generate([[1, 2, 3]], max_new_tokens=4)
    steps = list(stream(model, [[1, 2, 3]], max_new_tokens=4, temperature=temperature, top=3))
    assert [step.top[0][0] for step in steps] == [(token, 1.0) for token in greedy[3:]]
    assert {p for step in steps for _, p in step.top[0][1:]} == {0.0}
    for cuts in ({}, {"min_p": 0.1}, {"top_p": 0.5}):
        context = SamplingContext(GenerationConfig(temperature=temperature, **cuts), 0, [1], 1)
        assert probabilities(torch.tensor([3.0, 90.0, 89.0, float("-inf")]), context).tolist() == [0, 1, 0, 0]
