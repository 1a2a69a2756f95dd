"""Sequences, continuous batching and speculation: every row is its single run, and what ended is free again."""

from __future__ import annotations

import functools
import random

import pytest
import torch

import gptfast
from gptfast.generation import GenerationConfig, Request, Scheduler, TorchRunner, generate, stream
from gptfast.generation.cuda_graphs import CudaGraphRunner
from gptfast.generation.decoding import first_visible
from gptfast.generation.sampling import SamplingParams
from gptfast.generation.speculative import look_up
from gptfast.tokenizer import CharTokenizer
from tests.support.generation_pairs import make_pair
from tests.support.schedulers import run
from tests.support.strategies import assert_distributed, next_probs

pytest.importorskip("transformers")

V, BLOCK = 61, 48
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13], [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_pair("gpt2", tmp_path_factory.mktemp("gpt2"), V, BLOCK)[1]


@pytest.fixture(scope="module")
def assistant(model, tmp_path_factory):
    """A model that often agrees with `model`: its own weights, disturbed."""
    torch.manual_seed(8)
    near = gptfast.GPT(model.config).eval()
    near.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in near.parameters():
            p.add_(torch.randn_like(p) * 0.02 * p.std())
    return near


# ---- runners ----


@pytest.fixture(params=["torch", "captured steps", "engine"])
def make_runner(request, model):
    """Makes runners of each kind. Steps that are to be captured run uncaptured on the CPU."""
    return {
        "torch": lambda slots, length: TorchRunner(model, slots, length),
        "captured steps": lambda slots, length: CudaGraphRunner(model, slots, length),
        "engine": lambda slots, length: model.compile_for_inference("float32").runner(slots, length),
    }[request.param]


def fed(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


def test_slots_hold_what_they_were_given_in_any_order(make_runner, model):
    """A walk over all operations, beside plain forwards of the tokens that each slot holds."""
    rng = random.Random(4)
    runner, held = make_runner(6, BLOCK), {}
    for _ in range(150):
        action = rng.choice(["allocate", "fork", "extend", "extend", "extend", "decode", "copy", "truncate", "free"])
        if action in ("allocate", "fork") and len(held) < 5:
            count = 2 if len(held) < 4 else 1
            source = rng.choice(sorted(held)) if action == "fork" and held else None
            for slot in runner.allocate(count) if source is None else runner.fork(source, count):
                held[slot] = list(held[source]) if source is not None else []
        elif not held:
            continue
        elif action in ("extend", "decode"):
            room = [slot for slot in sorted(held) if len(held[slot]) + 8 <= BLOCK]
            slots = rng.sample(room, rng.randint(min(1, len(room)), len(room)))
            if not slots:
                continue
            new = [[rng.randrange(V) for _ in range(rng.choice([1, 1, 1, 4]))] for _ in slots]
            last_only = rng.random() < 0.5 or action == "decode"
            logits = runner.extend(slots, new, last_only)
            for i, slot in enumerate(slots):
                held[slot] += new[i]
                expected = fed(model, held[slot])[-1:] if last_only else fed(model, held[slot])[-len(new[i]) :]
                torch.testing.assert_close(logits[i].view_as(expected), expected, rtol=1e-4, atol=1e-4)
            if action == "decode":
                params = [SamplingParams(0.8, 0, 1.0, rng.choice([1, 1, 2]), slot) for slot in slots]
                for slot, tokens in zip(slots, runner.decode_steps(slots, logits, 4, params, [3, 4]), strict=True):
                    assert 1 <= len(tokens) <= 4 and not {3, 4} & set(tokens[:-1])
                    held[slot] += tokens[:-1]
        elif action == "copy":
            slots = rng.sample(sorted(held), rng.randint(1, len(held)))
            sources = [rng.choice(sorted(held)) for _ in slots]
            runner.copy(slots, sources)
            held |= {slot: list(held[source]) for slot, source in zip(slots, sources, strict=True)}
        elif action == "truncate":
            slot = rng.choice(sorted(held))
            length = rng.randint(0, len(held[slot]))
            runner.truncate(slot, length)
            held[slot] = held[slot][:length]
        elif action == "free":
            slot = rng.choice(sorted(held))
            runner.free(slot)
            del held[slot]
        assert [runner.lengths[slot] for slot in sorted(held)] == [len(held[slot]) for slot in sorted(held)]


def test_logits_do_not_depend_on_the_batch_bit_for_bit(make_runner):
    """With GPTFAST_GEMM=own, which these tests run under."""
    together, alone = make_runner(4, BLOCK), make_runner(1, BLOCK)
    slots = together.allocate(4)
    first = together.extend(slots, PROMPTS)
    then = together.extend(slots, [[n] for n in range(4)])
    for n, prompt in enumerate(PROMPTS):
        slot = alone.allocate()
        assert torch.equal(alone.extend(slot, [prompt])[0], first[n])
        assert torch.equal(alone.extend(slot, [[n]])[0], then[n])
        alone.free(slot[0])


def test_prompts_of_one_length_run_together(model, monkeypatch):
    """In forwards of a bounded number of tokens, with the logits of their own."""
    monkeypatch.setattr("gptfast.generation.torch_runner.PREFILL", 12)
    together, alone, calls = TorchRunner(model, 6, BLOCK), TorchRunner(model, 1, BLOCK), []
    prompts = [[n + k for k in range(length)] for n, length in enumerate((5, 3, 5, 5, 3, 5))]
    hook = model.register_forward_pre_hook(
        lambda _, args, given: calls.append(tuple(given["ids"].shape)), with_kwargs=True
    )
    logits = together.extend(together.allocate(6), prompts)
    hook.remove()
    assert sorted(calls) == [(1, 3), (1, 3), (1, 5), (1, 5), (2, 5)]  # rows of one forward lie side by side
    for prompt, own in zip(prompts, logits, strict=True):
        (slot,) = alone.allocate()
        assert torch.equal(alone.extend([slot], [prompt])[0], own)
        alone.free(slot)


def test_a_full_slot_is_left_alone_by_steps_of_others(make_runner):
    """Captured steps write behind the last position of slots that take no part."""
    runner, other = make_runner(3, 8), make_runner(1, 8)
    full, going, _ = runner.allocate(3)
    runner.extend([full, going], [[1] * 8, [2]])
    params = [SamplingParams(0.0, 0, 1.0, 0, 0)]
    for _ in range(3):
        [[*_, last]] = runner.decode_steps([going], runner.extend([going], [[5]]), 2, params)
    runner.truncate(full, 7)
    (slot,) = other.allocate()
    other.extend([slot], [[1] * 7])
    assert torch.equal(runner.extend([full], [[9]]), other.extend([slot], [[9]])) and 0 <= last < V


def test_too_many_slots_and_positions_are_refused(make_runner):
    runner = make_runner(2, 8)
    (slot,) = runner.allocate()
    for take in (lambda: runner.allocate(2), lambda: runner.fork(slot, 2)):
        with pytest.raises(RuntimeError, match="allocate: 2 more slots, but 1 of 2 are free; free some"):
            take()
    with pytest.raises(ValueError, match="extend: slot 0 holds 0 positions and 9 more do not fit into max_len = 8"):
        runner.extend([slot], [[1] * 9])
    for slots, tokens in (([], []), ([slot], [[]]), ([slot], [[1], [2]])):
        with pytest.raises(ValueError, match="expected distinct slots with at least one token each"):
            runner.extend(slots, tokens)


def test_a_runner_makes_runners_of_the_same_weights(make_runner):
    one = make_runner(1, 8)
    two = one.runner(2, 4)
    assert type(two) is type(one) and two.lengths == [0, 0]
    assert torch.equal(one.extend(one.allocate(), [[1, 2]])[0], two.extend(two.allocate(2), [[3], [1, 2]])[1])


# ---- continuous batching ----


def requests_of(seed, count):
    """Options of different requests, some ended by a token."""
    rng = random.Random(seed)
    for n in range(count):
        prompt = [rng.randrange(V) for _ in range(rng.randint(1, 20))]
        options = {"max_new_tokens": rng.randint(1, 20), "seed": n % 2, "eos_token_id": rng.choice([None, 5, [7, 9]])}
        options |= rng.choice(
            [{"temperature": 0}, {}, {"temperature": 1.5, "top_p": 0.9}, {"min_p": 0.1, "top_k": 9}, {"top_k": 3}]
        )
        options |= rng.choice([{}, {}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
        options |= rng.choice([{}, {}, {"num_return_sequences": 3}, {"prompt_lookup_num_tokens": 3}])
        yield prompt, options


def test_requests_that_come_and_go_get_their_single_runs(model):
    scheduler = Scheduler(model, max_rows=5, max_positions=150, max_prompt_tokens=25)
    rng, todo, submitted, most = random.Random(1), list(requests_of(2, 40)), [], 0
    told = {}
    while todo or scheduler.waiting or scheduler.running:
        for _ in range(min(len(todo), rng.choice([0, 0, 1, 3]))):
            prompt, options = todo.pop()
            submitted.append((prompt, options, scheduler.submit(prompt, **options)))
        for token in scheduler.step():
            told.setdefault((id(token.request), token.index), []).append(token.id)
        most = max(most, sum(length > 0 for length in scheduler.runner.lengths))
        assert sum(scheduler.runner.lengths) <= 150
    assert most == 5, "the batch was never full"
    for prompt, options, request in submitted:
        assert request.done and [row.tokens for row in request.sequences] == model.generate([prompt], **options)
        assert [told[id(request), row.index] for row in request.sequences] == [row.new for row in request.sequences]
    assert scheduler.runner.lengths == [0] * 5


def test_cancelled_requests_leave_at_once_and_disturb_nobody(model):
    scheduler = Scheduler(model, max_rows=2)
    kept = scheduler.submit([1, 2, 3], max_new_tokens=12, seed=1)
    gone = scheduler.submit([7], max_new_tokens=40, seed=2)
    late = scheduler.submit([9, 8], max_new_tokens=12, seed=3)
    never = scheduler.submit([9], max_new_tokens=12)
    for _ in range(3):
        scheduler.step()
    assert scheduler.waiting == 2 and scheduler.running == 2
    scheduler.cancel(gone)
    scheduler.cancel(never)
    scheduler.cancel(never)
    scheduler.step()
    assert scheduler.waiting == 0 and scheduler.running == 2
    run(scheduler)
    scheduler.cancel(kept)
    assert [row.finish for request in (kept, gone, late, never) for row in request.sequences] == [
        "length",
        "cancelled",
        "length",
        "cancelled",
    ]
    assert kept.sequences[0].tokens == model.generate([[1, 2, 3]], max_new_tokens=12, seed=1)[0]
    assert late.sequences[0].tokens == model.generate([[9, 8]], max_new_tokens=12, seed=3)[0]
    assert len(gone.sequences[0].new) == 3 and never.sequences[0].new == []


def test_a_request_may_begin_at_any_stream(model):
    config = GenerationConfig(max_new_tokens=8, temperature=2.0, seed=3, num_return_sequences=2)
    request = Request([1, 2, 3], config, first_stream=1)
    scheduler = Scheduler(model, max_rows=2)
    scheduler.submit_request(request)
    run(scheduler)
    rows = model.generate([[1, 2, 3]], max_new_tokens=8, temperature=2.0, seed=3, num_return_sequences=3)
    assert [row.tokens for row in request.sequences] == rows[1:] and rows[0] != rows[1] != rows[2]


def test_a_request_that_fails_leaves_the_others_alone(model):
    scheduler = Scheduler(model, max_rows=4)
    good = scheduler.submit([1, 2, 3], max_new_tokens=6, seed=1)
    banned = dict.fromkeys(range(V), float("-inf"))
    bad = scheduler.submit([7], max_new_tokens=6, logit_bias=banned, num_return_sequences=2, seed=0)
    run(scheduler)
    assert "no token is left" in str(bad.error) and {row.finish for row in bad.sequences} == {"error"}
    assert good.error is None and good.sequences[0].tokens == model.generate([[1, 2, 3]], max_new_tokens=6, seed=1)[0]
    assert scheduler.runner.lengths == [0] * 4


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        (
            [1],
            {"num_return_sequences": 3, "seed": 0},
            "num_return_sequences=3 of 1 .* never fit into max_rows=2, max_positions=60",
        ),
        (
            [1],
            {"num_return_sequences": 2, "max_new_tokens": 40, "seed": 0},
            "never fit into max_rows=2, max_positions=60",
        ),
        ([], {}, "prompt is empty"),
        ([V], {}, "prompt holds token id 61"),
        (
            [1] * 40,
            {"max_new_tokens": 20},
            "prompt has 40 tokens and max_new_tokens is 20, together 60, but block_size",
        ),
        ([1], {"num_beams": 2}, "num_beams must be 1; beams are searched together"),
        ([1], {"stop_strings": "a"}, "stop_strings without tokenizer"),
    ],
)
def test_the_scheduler_refuses_what_it_can_never_run(model, prompt, options, match):
    with pytest.raises(ValueError, match=match):
        Scheduler(model, max_rows=2, max_positions=60).submit(prompt, **{"max_new_tokens": 4, **options})


def test_the_window_is_a_function_of_the_length():
    starts = [first_visible(length, 8) for length in range(20)]
    assert starts == [0] * 9 + [4] * 4 + [8] * 4 + [12] * 3
    assert [first_visible(length, 1) for length in range(4)] == [0, 0, 1, 2]


# ---- speculation ----

SAMPLERS = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.9, "top_p": 0.95, "seed": 3},
    "processed": {"temperature": 1.2, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_p": 0.02, "seed": 0},
    "ended": {"eos_token_id": list(range(0, 20)), "seed": 8},
}


class Counting:
    """A model that counts how often it runs."""

    def __init__(self, model):
        self.model, self.config, self.calls = model, model.config, 0

    def runner(self, max_slots, max_len):
        runner = self.model.runner(max_slots, max_len)
        extend = runner.extend

        def counted(*args):
            self.calls += 1
            return extend(*args)

        runner.extend, runner.runner = counted, self.runner
        return runner


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("how", ["assistant", "itself", "stranger", "lookup"])
def test_speculation_changes_no_token(model, assistant, name, how):
    options = {"max_new_tokens": 30, "num_return_sequences": 2, **SAMPLERS[name]}
    expected = model.generate(PROMPTS, **options)
    torch.manual_seed(1)
    helpers = {
        "assistant": {"assistant_model": assistant},
        "itself": {"assistant_model": model, "num_assistant_tokens": 4},
        "stranger": {"assistant_model": gptfast.GPT(model.config), "num_assistant_tokens": 2},
        "lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3},
    }[how]
    counting = Counting(model)
    assert generate(counting, PROMPTS, **options, **helpers) == expected
    if how == "itself" and name != "ended":  # every guess is right: five tokens a step
        assert counting.calls == 1 + -(-29 // 5)
    if how == "assistant" and name != "ended":
        assert counting.calls < 30


def test_speculation_saves_steps_where_text_repeats(model):
    """A model that has learnt nothing but to repeat: bias makes 1 2 3 the only tokens, and greedy text a cycle."""
    bias = {token: -1e9 for token in range(V) if token not in (1, 2, 3)}
    options = {"max_new_tokens": 40, "temperature": 0, "logit_bias": bias}
    plain, counting = generate(model, [[1, 2, 3]], **options), Counting(model)
    assert generate(counting, [[1, 2, 3]], prompt_lookup_num_tokens=6, **options) == plain
    assert counting.calls < 25


def test_speculation_meets_stop_strings_and_slides(model, assistant):
    letters = CharTokenizer.train("".join(chr(48 + n) for n in range(V)))
    options = {"max_new_tokens": 30, "seed": 5, "tokenizer": letters}
    stop = letters.decode(model.generate(PROMPTS, **options)[0][12:14])
    expected = model.generate(PROMPTS, stop_strings=stop, **options)
    assert model.generate(PROMPTS, stop_strings=stop, assistant_model=assistant, **options) == expected
    options = {"max_new_tokens": 70, "seed": 5, "overflow": "slide"}
    assert model.generate(PROMPTS, assistant_model=assistant, **options) == model.generate(PROMPTS, **options)


def test_an_assistant_with_a_shorter_context_falls_silent(model):
    torch.manual_seed(2)
    short = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=V))
    options = {"max_new_tokens": 30, "seed": 5}
    assert model.generate(PROMPTS, assistant_model=short, **options) == model.generate(PROMPTS, **options)


def test_speculation_draws_from_the_models_distribution(tmp_path):
    """Pairs of the first two new tokens, the second of which is checked after a wrong-headed guess."""
    model = make_pair("gpt2", tmp_path, 6, 16, layers=1)[1]
    assistant = Biased(model, 3)
    rows = model.generate(
        [[1, 2]], assistant_model=assistant, max_new_tokens=3, temperature=4.0, num_return_sequences=3000, seed=0
    )
    assert assistant.calls > 0
    first = next_probs(model, [1, 2])
    pairs = torch.cat([first[t] * next_probs(model, [1, 2, t]) for t in range(6)])
    assert_distributed([6 * row[2] + row[3] for row in rows], pairs)
    guessed = torch.cat([first[t] * next_probs(assistant.plain, [1, 2, t]) for t in range(6)])
    with pytest.raises(AssertionError, match="chi-square"):
        assert_distributed([6 * row[2] + row[3] for row in rows], guessed.clamp_min(1e-4))


class Biased(Counting):
    """An assistant that is too fond of one token."""

    def __init__(self, model, token):
        super().__init__(model)
        self.bias = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([token]), 6.0)

    def runner(self, max_slots, max_len):
        runner = super().runner(max_slots, max_len)
        extend = runner.extend
        runner.extend = lambda *args: extend(*args) + self.bias
        return runner

    def plain(self, ids):
        return self.model(ids) + self.bias


def test_streams_of_speculation_have_a_step_per_position(model, assistant):
    options = {"max_new_tokens": 12, "seed": 3, "eos_token_id": list(range(6))}
    plain = [step.tokens for step in stream(model, PROMPTS, **options)]
    fast = [
        (step.tokens, step.logprobs)
        for step in stream(model, PROMPTS, assistant_model=assistant, logprobs=True, **options)
    ]
    assert [tokens for tokens, _ in fast] == plain
    assert all((a is None) == (b is None) for tokens, logprobs in fast for a, b in zip(tokens, logprobs, strict=True))


def test_look_up_takes_the_latest_and_longest_match():
    assert look_up([1, 2, 3, 9, 2, 3, 7, 8, 2, 3], 3, 2) == [7, 8]
    assert look_up([5, 1, 2, 6, 9, 2, 7, 1, 2], 2, 3) == [6, 9, 2]  # two tokens matched, not the later one
    assert look_up([1, 2, 3], 2, 4) == [] and look_up([4], 2, 4) == []
    assert look_up([4, 4], 2, 4) == [4]


def test_an_assistant_must_be_a_model_and_alone(model):
    with pytest.raises(TypeError, match="assistant_model is a int; expected a GPT"):
        model.generate([[1]], assistant_model=3, max_new_tokens=2)
    for call in (model.generate, functools.partial(stream, model)):
        with pytest.raises(
            ValueError, match="assistant_model with prompt_lookup_num_tokens=3; only one of them can draft"
        ):
            call([[1]], assistant_model=model, prompt_lookup_num_tokens=3, max_new_tokens=2)


@pytest.mark.parametrize("name", ["max_rows", "max_positions", "max_len", "max_prompt_tokens"])
def test_the_scheduler_refuses_bad_numbers(model, name):
    for value, error, expected in (
        (0, ValueError, "at least 1"),
        (-1, ValueError, "at least 1"),
        (2.5, TypeError, "an int"),
        (True, TypeError, "an int"),
    ):
        with pytest.raises(error, match=f"Scheduler: {name} is {value}; expected {expected}"):
            Scheduler(model, **{name: value})


@pytest.mark.parametrize("prompt", ["ab", 5, None, [[1]], [1.5], [True]], ids=repr)
def test_the_scheduler_refuses_what_is_no_prompt(model, prompt):
    with pytest.raises(TypeError, match=r"expected (a list of|int) token ids"):
        Scheduler(model).submit(prompt)
    with pytest.raises(ValueError, match="Scheduler: top is -1; expected at least 0"):
        Scheduler(model).submit([1], top=-1)


def test_an_assistant_of_another_vocabulary_is_refused(model):
    other = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=7))
    with pytest.raises(ValueError, match="assistant_model has a vocabulary of 7 and the model one of 61"):
        model.generate([[1]], assistant_model=other, max_new_tokens=2)
    with pytest.raises(ValueError, match="assistant_model has a vocabulary of 7"):
        stream(model, [[1]], assistant_model=other, max_new_tokens=2)
    with pytest.raises(ValueError, match="assistant_model with num_beams=2; leave one out"):
        model.generate([[1]], assistant_model=model, num_beams=2, max_new_tokens=2)
