"""What generation does when little is said: greedy as transformers, drawn when asked, as far as there is room."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import gptfast
from gptfast import ops
from gptfast.generation import GenerationConfig, Scheduler, generate, stream
from tests.support.generation_pairs import make_pair
from tests.support.schedulers import run

transformers = pytest.importorskip("transformers")

V, BLOCK = 61, 48
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13]]
DRAWING = [
    {"temperature": 1.0},
    {"temperature": 3.0},
    {"top_k": 9},
    {"top_p": 0.95},
    {"min_p": 0.01},
    {"do_sample": True},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair("gpt2", tmp_path_factory.mktemp("gpt2"), V, BLOCK)


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("writer")
def test_greedy_by_default_as_transformers(pair):
    theirs, model = pair
    ids = torch.randint(V, (3, 7))
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=15)
    before = torch.get_rng_state()
    assert torch.equal(model.generate(ids, max_new_tokens=15), expected)
    for greedy in ({"temperature": 0}, {"temperature": 0, "seed": 4, "top_k": 5}, {"do_sample": False, "seed": 4}):
        assert torch.equal(model.generate(ids, max_new_tokens=15, **greedy), expected), greedy
    assert [step.tokens[0] for step in stream(model, ids, max_new_tokens=15)] == expected[0, 7:].tolist()
    assert torch.equal(model.compile_for_inference("float32").generate(ids, max_new_tokens=15), expected)
    scheduler = Scheduler(model)
    request = scheduler.submit(ids[0], max_new_tokens=15)
    run(scheduler)
    assert request.sequences[0].tokens == expected[0].tolist()
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"


@pytest.mark.parametrize("options", DRAWING, ids=str)
def test_each_of_these_draws(options):
    assert GenerationConfig(**options).is_sampling and GenerationConfig.of(**options).is_sampling
    assert GenerationConfig(**options, seed=3).is_sampling
    assert not GenerationConfig(**options, num_beams=2).is_sampling if options == {"temperature": 1.0} else True
    assert GenerationConfig(seed=0).is_sampling


def test_what_does_not_draw():
    quiet = {"temperature": None, "top_k": None, "top_p": None, "min_p": None, "seed": None, "do_sample": None}
    for options in (
        {},
        quiet,
        {"repetition_penalty": 1.3},
        {"num_beams": 3, "seed": 1},
        {"temperature": 0.0, "top_p": 0.5},
    ):
        assert not GenerationConfig.of(**options).is_sampling, options
    config = GenerationConfig.of(**quiet)
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (1.0, 0, 1.0, 0.0)


@pytest.mark.usefixtures("writer")
@pytest.mark.parametrize("options", [*DRAWING, {"num_beams": 3, "do_sample": True, "temperature": 3.0}], ids=str)
def test_without_a_seed_torch_decides(pair, options):
    """Two calls differ, `torch.manual_seed` repeats them, and equal prompts of a batch get texts of their own."""
    model = pair[1]
    options = {"temperature": 2.0, **options, "max_new_tokens": 20}
    torch.manual_seed(5)
    first, second = (model.generate([[1, 2, 3], [1, 2, 3]], **options) for _ in range(2))
    assert first != second and first[0] != first[1] and second[0] != second[1]
    torch.manual_seed(5)
    assert model.generate([[1, 2, 3], [1, 2, 3]], **options) == first
    with torch.random.fork_rng():
        forked = model.generate([[1, 2, 3], [1, 2, 3]], **options)
    assert model.generate([[1, 2, 3], [1, 2, 3]], **options) == forked


def test_every_way_of_calling_draws_the_same(pair):
    """The engine, torch's loop and `stream` take the seed, and the streams, from the same place."""
    model, options = pair[1], {"temperature": 2.0, "max_new_tokens": 9, "num_return_sequences": 2}
    prompts, rows = [[1, 2], [1, 2], [5]], []
    for call in (
        lambda: model.generate(prompts, **options),
        lambda: generate(model, prompts, **options),
        lambda: generate(model, prompts, repetition_penalty=1.0, prompt_lookup_num_tokens=3, **options),
        lambda: model.compile_for_inference("float32").generate(prompts, **options),
    ):
        torch.manual_seed(1)
        rows.append(call())
    torch.manual_seed(1)
    steps = [step.tokens for step in stream(model, prompts, **options)]
    told = [list(row) for row in zip(*steps, strict=True)]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert told == [row[len(prompts[n // 2]) :] for n, row in enumerate(rows[0])]
    assert len({tuple(row) for row in told}) == 6


def test_with_a_seed_a_row_does_not_depend_on_the_batch(pair):
    before = torch.get_rng_state()
    rows = pair[1].generate([[1, 2], [1, 2], [5]], max_new_tokens=9, seed=3)
    assert rows[0] == rows[1] == pair[1].generate([[1, 2]], max_new_tokens=9, seed=3)[0]
    assert torch.equal(torch.get_rng_state(), before), "an explicit seed takes nothing from torch"


def test_requests_without_a_seed_differ(pair):
    scheduler = Scheduler(pair[1])
    requests = [scheduler.submit([1, 2], temperature=2.0, max_new_tokens=20) for _ in range(2)]
    run(scheduler)
    assert requests[0].sequences[0].new != requests[1].sequences[0].new


def test_several_texts_without_drawing_are_refused(pair):
    """As in transformers: they would be all alike."""
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="num_return_sequences"):
        pair[0].generate(ids, num_return_sequences=2, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(
        ValueError, match="num_return_sequences is 2 without drawing, which writes the same text each time"
    ):
        pair[1].generate(ids, num_return_sequences=2, max_new_tokens=2)
    assert pair[1].generate(ids, num_return_sequences=2, max_new_tokens=2, temperature=0).shape == (2, 4)


# ---- length ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("writer")
def test_new_tokens_by_default(pair):
    model = pair[1]
    assert [len(row) for row in model.generate([[1]])] == [BLOCK], "what room there is"
    assert [len(row) for row in model.generate(PROMPTS)] == [len(p) + BLOCK - 13 for p in PROMPTS]
    assert [len(row) for row in model.generate(PROMPTS, num_beams=2)] == [len(p) + BLOCK - 13 for p in PROMPTS]
    assert len(list(stream(model, [[1] * 40]))) == 8
    assert len(model.generate([[1]], overflow="slide")[0]) == 65
    with pytest.raises(ValueError, match=r"prompt 0 has 48 tokens .* block_size is 48"):
        model.generate([[1] * BLOCK])
    with pytest.raises(ValueError, match="max_new_tokens is 64, together 65, but block_size is 48"):
        model.generate([[1]], max_new_tokens=64)
    scheduler = Scheduler(model, max_len=20)
    request = scheduler.submit([1, 2])
    run(scheduler)
    assert len(request.sequences[0].tokens) == 20


def test_64_new_tokens_where_there_is_room():
    config = gptfast.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=200, vocab_size=V)
    assert len(gptfast.GPT(config).eval().generate([[1, 2]])[0]) == 66


@pytest.mark.usefixtures("writer")
def test_max_length_as_transformers(pair):
    theirs, model = pair
    ids = torch.randint(V, (2, 7))
    told = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(model.generate(ids, max_length=20), theirs.generate(ids, max_length=20, **told))
    both = {"max_length": 9, "max_new_tokens": 5}
    assert torch.equal(model.generate(ids, **both), theirs.generate(ids, **both, **told))
    ids, mask = torch.tensor([[0, 0, 0, 5, 6], [1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    expected = theirs.generate(ids, attention_mask=mask, max_length=12, pad_token_id=0)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_length=12), expected)
    with pytest.raises(
        ValueError, match=r"max_length is 5 and the longest prompt has 5 tokens; .* raise it, or give max_new"
    ):
        model.generate(ids, max_length=5)
    with pytest.raises(
        ValueError, match=r"max_new_tokens is 45 \(max_length is 50\), together 50, but block_size is 48"
    ):
        model.generate(ids, max_length=50)
    with pytest.raises(ValueError, match="max_length is 0; expected at least 1"):
        model.generate(ids, max_length=0)


def test_nanogpts_second_argument(pair):
    ids = torch.tensor([[1, 2]])
    assert torch.equal(pair[1].generate(ids, 5, temperature=0), pair[1].generate(ids, max_new_tokens=5))
    assert pair[1].compile_for_inference("float32").generate([[1]], 3) == pair[1].generate([[1]], 3)


# ---- defaults of torch ----------------------------------------------------------------------------------------------

TORCH = {
    ops.layer_norm: F.layer_norm,
    ops.dropout: F.dropout,
    ops.cross_entropy: F.cross_entropy,
    gptfast.nn.GELU: torch.nn.GELU,
    gptfast.nn.LayerNorm: torch.nn.LayerNorm,
    gptfast.nn.Linear: torch.nn.Linear,
    gptfast.nn.Dropout: torch.nn.Dropout,
    gptfast.nn.CrossEntropyLoss: torch.nn.CrossEntropyLoss,
}


@pytest.mark.parametrize("ours", TORCH, ids=lambda f: f.__module__)
def test_arguments_that_torch_has_default_as_there(ours):
    mine, theirs = (inspect.signature(f).parameters for f in (ours, TORCH[ours]))
    given = [name for name, p in mine.items() if p.default is not p.empty]
    shared = [name for name in given if name in theirs and theirs[name].default is not inspect.Parameter.empty]
    assert shared
    assert {name: mine[name].default for name in shared} == {name: theirs[name].default for name in shared}


def test_gelu_is_exact_by_default_as_torch():
    x = torch.linspace(-6, 6, 1001)
    expected = F.gelu(x)
    assert not torch.allclose(F.gelu(x, approximate="tanh"), expected, atol=1e-4)
    for backend in ("cpu", "eager"):
        torch.testing.assert_close(ops.gelu(x, backend=backend), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ops.reference.gelu(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gptfast.nn.GELU()(x), torch.nn.GELU()(x), rtol=1e-6, atol=1e-6)
    assert gptfast.nn.GELU().approximate == torch.nn.GELU().approximate
