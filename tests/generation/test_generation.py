"""Generation: token-equal to transformers for greedy and beams, equal to a plain loop for sampling, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gptfast
from gptfast import ops
from gptfast.generation import GenerationConfig, generate, stream
from gptfast.generation.torch_runner import evaluating
from tests.support.generation_pairs import make_pair, sharpen

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("writer")

V, BLOCK = 61, 48


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair("gpt2", tmp_path_factory.mktemp("gpt2"), V, BLOCK)


def theirs_generate(model, ids, **options):
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, do_sample=False, pad_token_id=options.get("eos_token_id", 0), **options
    )


def test_the_models_of_these_tests_look_back(pair):
    """Else a broken cache would go unnoticed: the first of six tokens decides, and texts are not one token repeated."""
    ids = torch.randint(V, (32, 6))
    changed = torch.cat([(ids[:, :1] + 17) % V, ids[:, 1:]], 1)
    a, b = (pair[1].generate(x, max_new_tokens=12, temperature=0)[:, 6:] for x in (ids, changed))
    assert (a[:, 0] != b[:, 0]).float().mean() > 0.5 and sum(len(set(row)) for row in a.tolist()) / 32 > 5


@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 7), (2, 30)])
def test_greedy_equals_transformers(pair, B, T):
    ids = torch.randint(V, (B, T))
    expected = theirs_generate(pair[0], ids, max_new_tokens=15)
    assert torch.equal(pair[1].generate(ids, max_new_tokens=15, temperature=0), expected)
    eos = expected[0, T + 3].item()
    options = {"max_new_tokens": 15, "eos_token_id": eos}
    assert torch.equal(pair[1].generate(ids, temperature=0, **options), theirs_generate(pair[0], ids, **options))


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 2.0])
@pytest.mark.parametrize(("B", "T", "K", "n"), [(1, 1, 2, 1), (3, 6, 4, 1), (2, 20, 5, 5)])
def test_beams_equal_transformers(pair, B, T, K, n, length_penalty, early_stopping):
    torch.manual_seed(T)
    ids = torch.randint(V, (B, T))
    greedy = theirs_generate(pair[0], ids, max_new_tokens=12)
    for eos in (None, greedy[0, T + 2].item()):
        options = {
            "num_beams": K,
            "num_return_sequences": n,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "max_new_tokens": 12,
            **({} if eos is None else {"eos_token_id": eos}),
        }
        ours, expected = pair[1].generate(ids, **options), theirs_generate(pair[0], ids, **options)
        assert torch.equal(ours, expected), (eos, ours.tolist(), expected.tolist())


@pytest.mark.parametrize("eos", [None, 2, [3, 0]])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_more_beams_than_tokens_equal_transformers(tmp_path, eos, early_stopping):
    """The first steps have fewer candidates than beams; what is not there must not count as ended."""
    for seed in range(4):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=40, vocab_size=4)
        theirs = transformers.GPT2LMHeadModel(config).eval()
        sharpen(theirs)
        theirs.save_pretrained(tmp_path)
        theirs.generation_config = transformers.GenerationConfig()
        options = {"num_beams": 6, "num_return_sequences": 3, "early_stopping": early_stopping, "max_new_tokens": 12}
        options |= {} if eos is None else {"eos_token_id": eos}
        model, ids = gptfast.GPT.from_pretrained(tmp_path), torch.randint(4, (3, 5))
        for length_penalty in (0.5, 1.5, 3.0):
            options["length_penalty"] = length_penalty
            expected = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=eos[0] if isinstance(eos, list) else eos or 0,
                **options,
            )
            assert torch.equal(model.generate(ids, **options), expected)


def test_beams_refuse_nan(pair):
    model = gptfast.GPT(pair[1].config)
    with torch.no_grad():
        model.wte.weight[1] = torch.nan
    with pytest.raises(RuntimeError, match="generate: the logits hold nan - look for an overflow"):
        model.generate([[1]], num_beams=2, max_new_tokens=2)


def plain_loop(model, prompt, n, stream, **options):
    """Sampling without a cache, one row, written out."""
    row = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([row]))[:, -1]
        row.append(ops.sample(logits, position=len(row), stream=stream, **options).item())
    return row


PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13]]


@pytest.mark.parametrize(
    "options", [{"seed": 0}, {"temperature": 0.7, "top_k": 5, "seed": 0}, {"temperature": 1.4, "top_p": 0.8, "seed": 9}]
)
def test_sampling_equals_a_plain_loop_row_by_row(pair, options):
    model = pair[1]
    rows = model.generate(PROMPTS, max_new_tokens=10, num_return_sequences=2, **options)
    for n, row in enumerate(rows):
        assert row == plain_loop(model, PROMPTS[n // 2], 10, stream=n % 2, **options)


@pytest.mark.parametrize(
    "shape",
    [
        {"norm_position": "post", "final_norm": False, "activation": "gelu_tanh"},
        {"attention_pattern": "alternating", "window": 4},
        {"position_embedding": "sinusoidal", "bias": False},
    ],
    ids=["gpt1", "gpt3-banded", "sinusoidal"],
)
def test_every_kind_of_model_samples_as_a_plain_loop(shape):
    torch.manual_seed(5)
    config = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=V, **shape)
    model = gptfast.GPT(config).eval()
    sharpen(model)
    rows = model.generate(PROMPTS, max_new_tokens=12, seed=6)
    assert rows == [plain_loop(model, prompt, 12, stream=0, seed=6) for prompt in PROMPTS]


def test_prompts_in_every_form(pair):
    rows = pair[1].generate([[1, 2, 3], [7]], max_new_tokens=4, temperature=0)
    forms = [[torch.tensor([1, 2, 3]), torch.tensor([7])], [list(np.array([1, 2, 3])), (7,)]]
    forms += [[np.array([1, 2, 3], np.uint16), np.array([7])]]
    assert all(pair[1].generate(form, max_new_tokens=4, temperature=0) == rows for form in forms)
    assert pair[1].generate([1, 2, 3], max_new_tokens=4, temperature=0) == rows[:1]
    for array in (np.array([1, 2, 3], np.uint16), np.array([[1, 2, 3]])):
        assert pair[1].generate(array, max_new_tokens=4, temperature=0) == rows[:1]
    one = pair[1].generate(torch.tensor([1, 2, 3], dtype=torch.int32), max_new_tokens=4, temperature=0)
    assert one.dtype == torch.int64 and one.tolist() == rows[:1]


def test_a_row_equals_its_single_run(pair):
    model = pair[1]
    together = model.generate(PROMPTS, max_new_tokens=12, seed=4, eos_token_id=5)
    alone = [model.generate([p], max_new_tokens=12, seed=4, eos_token_id=5)[0] for p in PROMPTS]
    assert together == alone
    beams = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": 5}
    assert model.generate(PROMPTS, **beams) == [model.generate([p], **beams)[0] for p in PROMPTS]


def test_returned_sequences_differ_and_seeds_repeat(pair):
    model, ids = pair[1], torch.tensor([[1, 2, 3]])
    a = model.generate(ids, max_new_tokens=12, temperature=2.0, num_return_sequences=3, seed=1)
    assert a.shape == (3, 15) and len({tuple(row) for row in a.tolist()}) == 3
    assert torch.equal(a, model.generate(ids, max_new_tokens=12, temperature=2.0, num_return_sequences=3, seed=1))
    assert not torch.equal(a, model.generate(ids, max_new_tokens=12, temperature=2.0, num_return_sequences=3, seed=2))


def test_stream_yields_tokens_and_probabilities(pair):
    model = pair[1]
    steps = list(stream(model, PROMPTS, max_new_tokens=6, temperature=0.9, seed=3, top=4, logprobs=True))
    rows = model.generate(PROMPTS, max_new_tokens=6, temperature=0.9, seed=3)
    assert [[s.tokens[n] for s in steps] for n in range(3)] == [row[-6:] for row in rows]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]]))[0, -1]
    probs = (logits / 0.9).softmax(-1)
    assert [t for t, _ in steps[0].top[0]] == probs.topk(4).indices.tolist()
    assert steps[0].top[0][0][1] == pytest.approx(probs.max().item(), rel=1e-4)
    assert steps[0].logprobs[0] == pytest.approx(logits.log_softmax(-1)[steps[0].tokens[0]].item(), rel=1e-4)
    plain = next(stream(model, PROMPTS, max_new_tokens=6, temperature=0.9, seed=3))
    assert (plain.tokens, plain.logprobs, plain.top) == (steps[0].tokens, [], [])
    assert len(next(stream(model, [[1]], max_new_tokens=1, top=V + 9)).top[0]) == V


def test_ended_rows_are_silent(pair):
    model = pair[1]
    first = [row[len(p)] for row, p in zip(model.generate(PROMPTS, max_new_tokens=1), PROMPTS, strict=True)]
    steps = list(stream(model, PROMPTS, max_new_tokens=4, eos_token_id=[V - 1, first[0]], logprobs=True))
    assert steps[0].tokens[0] == first[0] and steps[1].tokens[0] is None and steps[1].logprobs[0] is None
    rows = model.generate(PROMPTS, max_new_tokens=4, eos_token_id=[V - 1, first[0]])
    assert rows[0] == [*PROMPTS[0], first[0]]
    assert len(list(stream(model, [PROMPTS[0]], max_new_tokens=4, eos_token_id=first[0]))) == 1


def test_ended_rows_of_a_tensor_are_filled_with_the_first_end_token(pair):
    ids = torch.tensor([[1, 2, 3], [40, 50, 60]])
    free = pair[1].generate(ids, max_new_tokens=5, temperature=0).tolist()
    end = next(token for token in free[0][3:] if token not in free[1][3:])
    filler = next(token for token in range(V) if token not in free[0] + free[1])
    cut = free[0][: free[0].index(end, 3) + 1]
    out = pair[1].generate(ids, max_new_tokens=5, temperature=0, eos_token_id=[filler, end])
    assert len(cut) < 8 and out.tolist() == [cut + [filler] * (8 - len(cut)), free[1]]


def test_training_flags_come_back(pair):
    model = pair[1].train()
    model.h[0].eval()
    model.generate([[1]], max_new_tokens=2)
    assert model.training and not model.h[0].training and model.h[1].training
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training
    pair[1].eval()


def test_the_modes_of_a_stream_stay_inside_it(pair):
    model = pair[1].train()
    for _ in stream(model, [[1]], max_new_tokens=3):
        assert model.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert not model.generate(torch.tensor([[1]]), max_new_tokens=1).is_inference()
    model.eval()


def test_fills_the_whole_block(pair):
    assert pair[1].generate(torch.zeros(1, 8, dtype=torch.int64), max_new_tokens=BLOCK - 8).shape == (1, BLOCK)


@pytest.mark.parametrize(
    ("ids", "options", "error", "match"),
    [
        (
            [[1]],
            {"max_new_tokens": 48},
            ValueError,
            "1 tokens and max_new_tokens is 48, together 49, but block_size is 48; ask for at most 47 new tokens",
        ),
        (
            [[1], [1] * 46],
            {},
            ValueError,
            "prompt 1 has 46 tokens .* shorten the prompt to 44 or fewer or ask for at most 2 new tokens",
        ),
        ([[1] * 48], {"max_new_tokens": 99}, ValueError, "together 147, .* new tokens together are at most 48"),
        ([[]], {}, ValueError, "prompt 0 is empty"),
        ([], {}, ValueError, "holds no prompts"),
        ([[1], [61]], {}, ValueError, r"prompt 1 holds token id 61; expected ids in \[0, 61\)"),
        ([[-1]], {}, ValueError, "holds token id -1"),
        ([["a"]], {}, TypeError, "holds 'a'; expected int token ids"),
        ("abc", {}, TypeError, "ids is a str"),
        ([[True]], {}, TypeError, "holds True; expected int token ids"),
        ([[1], 2], {}, TypeError, "prompt 1 is 2; expected a list of token ids"),
        (torch.ones(2, 0, dtype=torch.int64), {}, ValueError, "prompt 0 is empty"),
        (torch.ones(1, 1, 1, dtype=torch.int64), {}, TypeError, r"shape \(1, 1, 1\); expected \(B, T\)"),
        ([[1]], {"eos_token_id": 61}, ValueError, r"eos_token_id is 61; expected ids in \[0, 61\)"),
        ([[1]], {"eos_token_id": -1}, ValueError, "eos_token_id is -1; expected at least 0"),
        ([[1]], {"eos_token_id": [1, 2.5]}, TypeError, "eos_token_id is 2.5; expected an int"),
        ([[1]], {"eos_token_id": 2.5}, TypeError, "eos_token_id is 2.5; expected an int"),
        (torch.ones(1, 2), {}, TypeError, r"torch.float32 tensor of shape \(1, 2\)"),
        (torch.ones(1, 2, dtype=torch.bool), {}, TypeError, r"torch.bool tensor of shape \(1, 2\)"),
        (torch.tensor(3), {}, TypeError, r"torch.int64 tensor of shape \(\); expected \(B, T\) token ids"),
        (np.ones((1, 2)), {}, TypeError, r"float64 array of shape \(1, 2\); expected \(B, T\) token ids"),
        ([np.ones(2)], {}, TypeError, "prompt 0 holds 1.0; expected int token ids"),
        (None, {}, TypeError, "ids is a NoneType; expected"),
        ([[2**70]], {}, ValueError, "holds token id 1180591620717411303424"),
        ([[1]], {"temperature": float("nan")}, ValueError, "temperature is nan; expected a finite number"),
        ([[1]], {"temperature": 10**400}, ValueError, "expected a finite number, in the range of 32 bits"),
        ([[1]], {"temperature": 1e39}, ValueError, r"temperature is 1e\+39; expected a finite number"),
        ([[1]], {"temperature": -0.1}, ValueError, "generate: temperature is -0.1"),
        ([[1]], {"temperature": float("inf"), "num_beams": 2}, ValueError, "temperature is inf; expected a finite"),
        ([[1]], {"temperature": "hot"}, TypeError, "temperature is 'hot'; expected a number"),
        ([[1]], {"top_p": 0.0}, ValueError, "generate: top_p is 0.0"),
        ([[1]], {"top_p": 1.01}, ValueError, "generate: top_p is 1.01"),
        ([[1]], {"top_p": float("nan")}, ValueError, "generate: top_p is nan; expected a finite number"),
        ([[1]], {"top_k": -1}, ValueError, "generate: top_k is -1; expected at least 0"),
        ([[1]], {"top_k": 2**63}, ValueError, "top_k is 9223372036854775808; expected at most 9223372036854775807"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 2.0}, TypeError, "max_new_tokens is 2.0; expected an int"),
        ([[1]], {"seed": -1}, ValueError, "generate: seed is -1"),
        ([[1]], {"seed": 2**64}, ValueError, "generate: seed is 18446744073709551616"),
        ([[1]], {"num_return_sequences": 0}, ValueError, "num_return_sequences is 0; expected at least 1"),
        ([[1]], {"num_beams": 0}, ValueError, "num_beams is 0; expected at least 1"),
        ([[1]], {"num_beams": True}, TypeError, "num_beams is True; expected an int"),
        ([[1]], {"num_beams": 2, "temperature": 0.5}, ValueError, "temperature=0.5, .* beam search draws nothing"),
        ([[1]], {"num_beams": 2, "length_penalty": 1e4}, ValueError, "length_penalty is 10000.0; 4 new tokens to this"),
        ([[1]], {"num_beams": 2, "length_penalty": float("nan")}, ValueError, "length_penalty is nan"),
        (
            [[1]],
            {"num_beams": 2, "num_return_sequences": 3},
            ValueError,
            "num_return_sequences is 3 but num_beams is 2",
        ),
        ([[1]], {"num_beams": 2, "top_k": 5}, ValueError, "beam search draws nothing"),
        ([[1]], {"early_stopping": "maybe"}, ValueError, "early_stopping is 'maybe'"),
        ([[1]], {"early_stopping": 1}, ValueError, "early_stopping is 1; expected True, False or 'never'"),
        ([[1]], {"max_size": 5}, TypeError, "unknown option 'max_size'; expected some of max_new_tokens, max_length"),
    ],
)
def test_errors(pair, ids, options, error, match):
    with pytest.raises(error, match=match):
        generate(pair[1], ids, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_beams": 2}, "stream: num_beams must be 1"),
        ({"top": -1}, "stream: top is -1; expected at least 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_new_tokens": BLOCK}, "block_size is 48"),
    ],
)
def test_stream_checks_before_the_first_step(pair, options, match):
    with pytest.raises(ValueError, match=match):
        stream(pair[1], [[1]], **options)


def test_config_takes_a_list_of_end_tokens():
    assert GenerationConfig(eos_token_id=[1, 2]).eos_ids == (1, 2)
    assert GenerationConfig(eos_token_id=7).eos_ids == (7,)
