"""The interface between generation loops and the engine: rows that come and go, are copied, shortened and ragged."""

from __future__ import annotations

import pytest
import torch

import gptfast.engine.generate as inside
from gptfast import ops
from gptfast.backend import has_cpu_ops
from gptfast.engine import EngineSequences
from gptfast.engine.runner import empty_logits
from gptfast.generation import GenerationConfig, beam, scheduler
from gptfast.generation import generate as generate_by_steps
from gptfast.generation.runner import Sampling
from gptfast.generation.stopping import Stopping
from gptfast.tokenizer import CharTokenizer
from tests.support.engine_models import ids_of, model_of

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")


def compiled(dtype: str = "float32", **options):
    return model_of("gpt2").compile_for_inference(dtype, **options)


def test_all_logits_of_ragged_rows() -> None:
    sequences = compiled().sequences(2)
    rows = sequences.add(2)
    parts = sequences.extend(rows, [[1, 2, 3], [4]], last_only=False)
    assert [tuple(part.shape) for part in parts] == [(3, 301), (1, 301)]
    again = compiled().sequences(2)
    assert torch.equal(again.extend(again.add(2), [[1, 2, 3], [4]]), torch.stack([parts[0][-1], parts[1][-1]]))


def test_results_are_kept_apart() -> None:
    """What one call returned is not written over by the next."""
    sequences = compiled().sequences(1)
    (row,) = sequences.add()
    first = sequences.extend([row], [[1]])
    copy = first.clone()
    sequences.extend([row], [[2]])
    assert torch.equal(first, copy)


def test_copies_share_pages_and_release_frees_them() -> None:
    sequences = compiled().sequences(4)
    (row,) = sequences.add()
    sequences.extend([row], [ids_of("gpt2")[0, :130].tolist()])
    page = sequences.nbytes // 3
    copies = sequences.add(3, like=row)
    assert sequences.nbytes == 3 * page
    sequences.extend([copies[0]], [[1]])
    assert sequences.nbytes == 4 * page, "only the last page, half filled, becomes the copy's own"
    for r in (row, *copies):
        sequences.release(r)
    assert sequences.lengths == [0] * 4
    for _ in range(50):  # memory stays flat
        (row,) = sequences.add()
        sequences.extend([row], [ids_of("gpt2")[0, :130].tolist()])
        sequences.release(row)
    assert sequences.nbytes <= 8 * page


def test_cache_dtype_halves_the_cache() -> None:
    sizes = []
    for cache_dtype in ("float32", "bfloat16"):
        sequences = compiled(cache_dtype=cache_dtype).sequences(1)
        sequences.extend(sequences.add(), [[1]])
        sizes.append(sequences.nbytes)
    assert sizes[0] == 2 * sizes[1]


def test_errors_of_capacity() -> None:
    compiled = model_of("odd").compile_for_inference("int8")
    with pytest.raises(ValueError, match=r"capacity_rows is 1\.5; expected an int of at least 1"):
        compiled.sequences(1.5)
    with pytest.raises(MemoryError, match="no memory for capacity_rows = 1000000000000; run fewer"):
        compiled.sequences(10**12)


def test_errors() -> None:
    model = compiled(max_rows=4)
    with pytest.raises(ValueError, match="capacity_rows is 5 and the model was compiled with max_rows=4"):
        model.sequences(5)
    with pytest.raises(ValueError, match="capacity_rows is 0"):
        model.sequences(0)
    with pytest.raises(ValueError, match="max_len is 151; expected 1 to block_size = 150"):
        model.sequences(1, 151)
    sequences = model.sequences(2, 10)
    (row,) = sequences.add()
    with pytest.raises(RuntimeError, match="2 more rows do not fit, 1 of 2 are free"):
        sequences.add(2)
    with pytest.raises(ValueError, match="row 1 is not in use"):
        sequences.extend([1], [[1]])
    for use in (lambda: sequences.add(1, like=1), lambda: sequences.reorder([row], [1]), lambda: sequences.release(1)):
        with pytest.raises(ValueError, match="row 1 is not in use"):
            use()
    for rows, tokens in (([row], [[]]), ([], []), ([row, row], [[1], [2]]), ([row], [[1], [2]])):
        with pytest.raises(ValueError, match="expected different rows with at least one token each"):
            sequences.extend(rows, tokens)
    for token in (-1, 301):
        with pytest.raises(ValueError, match="expected ids in \\[0, 301\\)"):
            sequences.extend([row], [[token]])
    with pytest.raises(ValueError, match="row 0 holds 0 positions and 11 more do not fit into max_len = 10"):
        sequences.extend([row], [[1] * 11])
    with pytest.raises(ValueError, match="length is 1; row 0 holds 0 positions"):
        sequences.truncate(row, 1)
    with pytest.raises(ValueError, match="expected as many, rows without repeats"):
        sequences.reorder([row, row], [row, row])
    assert sequences.lengths == [0, 0]


@pytest.mark.parametrize("how", [{"temperature": 0.9, "top_k": 20, "do_sample": True}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("copies", [1, 3])
def test_common_options_run_inside_the_engine(copies, how, monkeypatch):
    """Not by way of torch, whose threads would spin beside the engine's; the tokens are those of the other way."""
    model = compiled()
    options = {"max_new_tokens": 9, "seed": 3, "num_return_sequences": copies, **how}
    expected = generate_by_steps(model, [[1, 2, 3], [4]], **options)
    monkeypatch.setattr(inside, "generate_by_steps", None)
    assert model.generate([[1, 2, 3], [4]], **options) == expected


SETTINGS = [
    {"temperature": 0},
    {"seed": 2**64 - 1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 0},
    {"temperature": 0.7, "top_p": 0.3, "seed": 7},
    {"top_k": 3, "num_return_sequences": 2, "seed": 0},
    {"min_p": 0.01, "temperature": 2.0, "seed": 0},
    {"repetition_penalty": 1.5, "seed": 3, "logit_bias": {7: 3.0}},
]


def requests_of(settings, model, max_new_tokens=9, **more):
    """A scheduler with a request for each of these options, which differ in prompts and streams too."""
    letters = CharTokenizer.train("".join(chr(256 + n) for n in range(301)))
    one = scheduler.Scheduler(model, max_rows=9, max_len=75)
    for n, options in enumerate(settings):
        prompt = [[1, 2, 3], [4], list(range(62))][n % 3]
        config = GenerationConfig(**{"max_new_tokens": max_new_tokens, **options, **more})
        one.submit_request(scheduler.Request(prompt, config, Stopping(config, letters), first_stream=2**32 - 2 + n))
    return one


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (SETTINGS[:1] * 3, {}),
        (SETTINGS[2:3] * 3, {}),
        (SETTINGS, {}),
        (SETTINGS[1:4], {"prompt_lookup_num_tokens": 3}),
        (SETTINGS[1:4], {"overflow": "slide", "max_new_tokens": 30}),
    ],
    ids=["greedy", "alike", "different", "guessed", "slides"],
)
def test_steps_draw_inside_what_they_would_draw_outside(settings, more, monkeypatch):
    told = []
    for function in (lambda *_: None, EngineSequences.draw):
        monkeypatch.setattr(EngineSequences, "draw", function)
        running = requests_of(settings, compiled(), **more)
        requests = list(running._waiting)
        running.run()
        told.append([row.new for request in requests for row in request.rows])
        monkeypatch.setattr("gptfast.generation.sampling._draw", None)  # from now on all is to be drawn inside
    assert told[0] == told[1] and all(len(new) >= 9 for new in told[0])


def test_rows_of_one_call_are_drawn_each_as_it_asks():
    """To the bit what ops.sample draws from the same logits, with faults told row by row."""
    torch.manual_seed(3)
    sequences, logits = compiled().sequences(1), empty_logits(8, 301)
    logits.copy_(4 * torch.randn(8, 301))
    logits[5, 4], logits[6] = float("nan"), float("-inf")
    samplings = [
        Sampling(temperature, top_k, top_p, seed, stream)
        for temperature, top_k, top_p, seed, stream in [
            (0.0, 0, 1.0, 0, 0),
            (1.0, 0, 1.0, 2**64 - 1, 2**32 - 1),
            (0.5, 7, 1.0, 1, 2),
            (1.5, 0, 0.9, 2, 1),
            (2.0, 50, 0.4, 3, 0),
            (1.0, 0, 1.0, 4, 0),
            (0.0, 0, 1.0, 5, 0),
            (1e-40, 0, 1.0, 5, 0),
        ]
    ]
    positions = [0, 2**32 - 1, 5, 5, 6, 0, 0, 3]
    drawn = sequences.draw(logits, samplings, positions)
    assert drawn[5:7] == [-1, -2]
    for n in (0, 1, 2, 3, 4, 7):
        temperature, top_k, top_p, seed, stream, _ = samplings[n]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        assert drawn[n] == ops.sample(logits[n : n + 1], position=positions[n], stream=stream, **options).item()


def test_decode_draws_each_row_as_it_asks():
    """Several steps inside the engine, rows that end on the way, against ops.sample step by step."""
    model, samplings = (
        compiled(),
        [Sampling(0.0, 0, 1.0, 0, 0), Sampling(2.0, 0, 0.9, 5, 1, vocab=200), Sampling(1.5, 40, 1.0, 9, 7)],
    )
    prompts, ends = [[1, 2, 3], [4], list(range(70))], list(range(0, 301, 9))
    sequences = model.sequences(3)
    rows = sequences.add(3)
    new = sequences.decode(rows, sequences.extend(rows, prompts), steps=20, more=False, samplings=samplings, ends=ends)
    for prompt, tokens, sampling in zip(prompts, new, samplings, strict=True):
        text = list(prompt)
        for token in tokens:
            temperature, top_k, top_p, seed, stream, vocab = sampling
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
            logits = model.logits(torch.tensor(text))[-1:, : vocab or None]
            assert token == ops.sample(logits, position=len(text), stream=stream, **options).item()
            text.append(token)
        assert (tokens[-1] in ends or len(tokens) == 20) and not set(tokens[:-1]) & set(ends)
    assert len({len(tokens) for tokens in new}) > 1, "no row ended before the others"


BURSTS = {
    "plain": ([{}, {"temperature": 0}, {"seed": 5, "top_p": 0.9}, {"num_return_sequences": 2, "seed": 0}], {}),
    "ended": ([{"eos_token_id": list(range(0, 301, 9)), "seed": n} for n in range(5)], {}),
    "stopped": ([{"stop_strings": [chr(256 + n) for n in range(0, 301, 9)], "seed": n} for n in range(5)], {}),
    "slides": ([{"seed": n} for n in range(3)], {"overflow": "slide", "max_new_tokens": 40}),
    "of different lengths": ([{"seed": n} for n in range(3)] + [{"logit_bias": {7: 50.0}, "max_new_tokens": 3}], {}),
    "of different ends": (
        [{"eos_token_id": list(range(n, 301, 9)), "seed": n, "max_new_tokens": 6 + n} for n in range(5)],
        {},
    ),
}


@pytest.mark.parametrize("name", BURSTS)
def test_bursts_of_tokens_are_single_steps(name, monkeypatch):
    settings, more = BURSTS[name]
    steps, decode = [], EngineSequences.decode
    monkeypatch.setattr(
        EngineSequences,
        "decode",
        lambda self, *args, **options: steps.append(options["steps"]) or decode(self, *args, **options),
    )
    told = []
    for most in (1, 4):
        running = requests_of(settings, compiled(), **more)
        requests = list(running._waiting)
        first = running.step(most)
        seen = {(token.request, token.stream): [token.id] for token in first}
        assert len(first) == len(seen), "a first token is told at once"
        while running.waiting or running.running:
            for token in running.step(most):
                seen.setdefault((token.request, token.stream), []).append(token.id)
        assert running._sequences.lengths == [0] * 9
        rows = [row for request in requests for row in request.rows]
        assert [seen[row.request, row.stream] for row in rows] == [row.new for row in rows]
        told.append([(row.new, row.finish) for row in rows])
        assert not steps or most == 4
    assert told[0] == told[1] and 4 in steps and all(2 <= n <= 4 for n in steps)


def test_a_burst_ends_when_there_is_something_to_do():
    model, draws = compiled(), [Sampling(1.0, 0, 1.0, n, 0) for n in range(2)]
    sequences = model.sequences(4)
    whole, parts = sequences.add(2), sequences.add(2)
    prompts = [[1, 2], [3]]
    expected = sequences.decode(whole, sequences.extend(whole, prompts), steps=6, more=False, samplings=draws)
    sequences.interrupt()
    first = sequences.decode(parts, sequences.extend(parts, prompts), steps=6, more=False, samplings=draws)
    assert [len(tokens) for tokens in first] == [1, 1]
    rest = sequences.decode(parts, sequences.extend(parts, first), steps=5, more=False, samplings=draws)
    assert [a + b for a, b in zip(first, rest, strict=True)] == expected, "once is enough"
    sequences.interrupt()
    for row in whole:
        sequences.release(row)
    rows = sequences.add(2)
    new = sequences.decode(rows, sequences.extend(rows, prompts), steps=6, more=True, samplings=draws)
    assert new == expected, "with more to come nothing is cut"


def test_draw_refuses_logits_of_another_shape():
    sequences = compiled().sequences(1)
    for logits in (torch.zeros(1, 300), torch.zeros(2, 301), torch.zeros(1, 301, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"draw: logits has shape .*; expected \(1, 301\), torch.float32"):
            sequences.draw(logits, [Sampling(0.0, 0, 1.0, 0, 0)], [0])


@pytest.mark.parametrize("most", [1, 4])
def test_nan_in_one_row_ends_that_request_alone(most, monkeypatch):
    running = requests_of([{}] * 3, compiled())
    extend = EngineSequences.extend

    def damaged(self, rows, tokens, last_only=True):
        logits = extend(self, rows, tokens, last_only)
        logits[1, 7] = float("nan")
        return logits

    monkeypatch.setattr(EngineSequences, "extend", damaged)
    bad = running._waiting[1]
    running.step(most)
    monkeypatch.setattr(EngineSequences, "extend", extend)
    assert "the logits hold nan" in str(bad.error) and bad.done and running.running == 2
    running.run()


def threads_seen(monkeypatch, *places):
    """The numbers of torch's threads under which these functions are called from now on."""
    seen = []
    for module, name in places:
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, original=original: seen.append(torch.get_num_threads()) or original(*a)
        )
    return seen


@pytest.mark.parametrize("options", [{"min_p": 0.1}, {"num_beams": 3}, {"return_logprobs": True}], ids=str)
def test_torch_works_on_one_thread_beside_the_engine(options, monkeypatch):
    """Its others would go on spinning on the engine's cores; afterwards everything is as it was."""
    seen = threads_seen(monkeypatch, (scheduler, "_details"), (beam, "_logprobs"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compiled().generate([[1, 2, 3]], max_new_tokens=3, **options)
        assert seen == [1] * 3 and torch.get_num_threads() == 2
        seen.clear()
        generate_by_steps(model_of("gpt2"), [[1, 2, 3]], max_new_tokens=3, **options)
        assert seen == [2] * 3, "a GPT computes on torch's threads"
    finally:
        torch.set_num_threads(before)


def test_threads_come_back_after_an_error(monkeypatch):
    monkeypatch.setattr(scheduler, "choose", None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(TypeError):
            compiled().generate([[1]], max_new_tokens=3, min_p=0.1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
