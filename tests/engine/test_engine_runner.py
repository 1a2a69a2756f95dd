"""`EngineRunner`: slots that come and go, are copied, shortened and ragged; what the scheduler makes of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptfast import ops
from gptfast.backend import has_cpu_ops
from gptfast.engine import EngineRunner
from gptfast.engine.runner import empty_logits
from gptfast.generation import GenerationConfig, Runner, api, beam, decoding, generate, scheduler
from gptfast.generation.sampling import SamplingParams
from gptfast.tokenizer import CharTokenizer
from tests.support.engine_models import ids_of, model_of
from tests.support.schedulers import run

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")


def compiled(dtype: str = "float32", **options):
    return model_of("gpt2").compile_for_inference(dtype, **options)


def test_all_logits_of_ragged_rows() -> None:
    runner = compiled().runner(2)
    rows = runner.allocate(2)
    parts = runner.extend(rows, [[1, 2, 3], [4]], last_only=False)
    assert [tuple(part.shape) for part in parts] == [(3, 301), (1, 301)]
    again = compiled().runner(2)
    assert torch.equal(again.extend(again.allocate(2), [[1, 2, 3], [4]]), torch.stack([parts[0][-1], parts[1][-1]]))


def test_results_are_kept_apart() -> None:
    """What one call returned is not written over by the next."""
    runner = compiled().runner(1)
    (row,) = runner.allocate()
    first = runner.extend([row], [[1]])
    copy = first.clone()
    runner.extend([row], [[2]])
    assert torch.equal(first, copy)


def test_copies_share_pages_and_free_gives_them_back() -> None:
    runner = compiled().runner(4)
    (row,) = runner.allocate()
    runner.extend([row], [ids_of("gpt2")[0, :130].tolist()])
    page = runner.nbytes // 3
    copies = runner.fork(row, 3)
    assert runner.nbytes == 3 * page
    runner.extend([copies[0]], [[1]])
    assert runner.nbytes == 4 * page, "only the last page, half filled, becomes the copy's own"
    for r in (row, *copies):
        runner.free(r)
    assert runner.lengths == [0] * 4
    for _ in range(50):  # memory stays flat
        (row,) = runner.allocate()
        runner.extend([row], [ids_of("gpt2")[0, :130].tolist()])
        runner.free(row)
    assert runner.nbytes <= 8 * page


def test_cache_dtype_halves_the_cache() -> None:
    sizes = []
    for cache_dtype in ("float32", "bfloat16"):
        runner = compiled(cache_dtype=cache_dtype).runner(1)
        runner.extend(runner.allocate(), [[1]])
        sizes.append(runner.nbytes)
    assert sizes[0] == 2 * sizes[1]


def test_errors_of_capacity() -> None:
    compiled = model_of("odd").compile_for_inference("int8")
    with pytest.raises(TypeError, match=r"runner: max_slots is 1\.5; expected an int"):
        compiled.runner(1.5)
    with pytest.raises(MemoryError, match="no memory for max_slots = 1000000000000; run fewer"):
        compiled.runner(10**12)


def test_errors() -> None:
    model = compiled(max_rows=4)
    with pytest.raises(ValueError, match="max_slots is 5 and the model was compiled with max_rows=4"):
        model.runner(5)
    with pytest.raises(ValueError, match="max_slots is 0"):
        model.runner(0)
    with pytest.raises(ValueError, match="max_len is 151; expected at most 150"):
        model.runner(1, 151)
    runner = model.runner(2, 10)
    (row,) = runner.allocate()
    with pytest.raises(RuntimeError, match="2 more slots, but 1 of 2 are free"):
        runner.allocate(2)
    with pytest.raises(ValueError, match="slot 1 is not in use"):
        runner.extend([1], [[1]])
    for use in (lambda: runner.fork(1, 1), lambda: runner.copy([row], [1]), lambda: runner.free(1)):
        with pytest.raises(ValueError, match="slot 1 is not in use"):
            use()
    for rows, tokens in (([row], [[]]), ([], []), ([row, row], [[1], [2]]), ([row], [[1], [2]])):
        with pytest.raises(ValueError, match="expected distinct slots with at least one token each"):
            runner.extend(rows, tokens)
    for token in (-1, 301):
        with pytest.raises(ValueError, match="expected ids in \\[0, 301\\)"):
            runner.extend([row], [[token]])
    with pytest.raises(ValueError, match="slot 0 holds 0 positions and 11 more do not fit into max_len = 10"):
        runner.extend([row], [[1] * 11])
    with pytest.raises(ValueError, match="length is 1; slot 0 holds 0 positions"):
        runner.truncate(row, 1)
    with pytest.raises(ValueError, match="expected as many, and distinct slots"):
        runner.copy([row, row], [row, row])
    assert runner.lengths == [0, 0]


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
        one.submit_request(scheduler.Request(prompt, config, letters, first_stream=2**32 - 2 + n))
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
    decode_steps = EngineRunner.decode_steps
    monkeypatch.setattr(EngineRunner, "decode_steps", Runner.decode_steps)
    for function in (Runner.sample, EngineRunner.sample):
        monkeypatch.setattr(EngineRunner, "sample", function)
        running = requests_of(settings, compiled(), **more)
        requests = list(running._waiting)
        run(running)
        told.append([row.new for request in requests for row in request.sequences])
        monkeypatch.setattr("gptfast.ops.sample", None)  # from now on all is to be drawn inside
    assert told[0] == told[1] and all(len(new) >= 9 for new in told[0])
    monkeypatch.setattr(EngineRunner, "decode_steps", decode_steps)
    running = requests_of(settings, compiled(), **more)
    requests = list(running._waiting)
    run(running)
    assert [row.new for request in requests for row in request.sequences] == told[0]


def test_rows_of_one_call_are_drawn_each_as_it_asks():
    """To the bit what ops.sample draws from the same logits, with faults told row by row."""
    torch.manual_seed(3)
    runner, logits = compiled().runner(1), empty_logits(8, 301)
    logits.copy_(4 * torch.randn(8, 301))
    logits[5, 4], logits[6] = float("nan"), float("-inf")
    samplings = [
        SamplingParams(temperature, top_k, top_p, seed, stream)
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
    drawn = runner.sample(logits, samplings, positions)
    assert drawn[5:7] == [-1, -2]
    for n in (0, 1, 2, 3, 4, 7):
        temperature, top_k, top_p, seed, stream, _ = samplings[n]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        assert drawn[n] == ops.sample(logits[n : n + 1], position=positions[n], stream=stream, **options).item()


def test_decode_draws_each_row_as_it_asks():
    """Several steps inside the engine, rows that end on the way, against ops.sample step by step."""
    model, samplings = (
        compiled(),
        [
            SamplingParams(0.0, 0, 1.0, 0, 0),
            SamplingParams(2.0, 0, 0.9, 5, 1, vocab=200),
            SamplingParams(1.5, 40, 1.0, 9, 7),
        ],
    )
    prompts, ends = [[1, 2, 3], [4], list(range(70))], list(range(0, 301, 9))
    runner = model.runner(3)
    rows = runner.allocate(3)
    new = runner.decode_steps(rows, runner.extend(rows, prompts), 20, samplings, ends)
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


MULTI_STEPS = {
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


@pytest.mark.parametrize("name", MULTI_STEPS)
def test_multi_token_steps_give_the_tokens_of_single_steps(name, monkeypatch):
    settings, more = MULTI_STEPS[name]
    steps, decode = [], EngineRunner.decode_steps
    monkeypatch.setattr(EngineRunner, "decode_steps", lambda self, *args: steps.append(args[2]) or decode(self, *args))
    told = []
    for max_tokens in (1, 4):
        running = requests_of(settings, compiled(), **more)
        requests = list(running._waiting)
        first = running.step(max_tokens)
        seen = {(token.request, token.index): [token.id] for token in first}
        assert len(first) == len(seen), "a first token is delivered at once"
        while running.waiting or running.running:
            for token in running.step(max_tokens):
                seen.setdefault((token.request, token.index), []).append(token.id)
        assert running.runner.lengths == [0] * 9
        rows = [row for request in requests for row in request.sequences]
        assert [seen[row.request, row.index] for row in rows] == [row.new for row in rows]
        told.append([(row.new, row.finish) for row in rows])
        assert max_tokens == 4 or set(steps) <= {1}
    assert told[0] == told[1] and 4 in steps and all(1 <= n <= 4 for n in steps)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [1, 32, 17]), (1.0, [1, 16, 16, 16, 1])])
def test_calls_that_are_short_grow(seconds, expected, monkeypatch):
    """Ctrl-C is handled between calls of the engine."""
    steps, decode, clock = [], EngineRunner.decode_steps, itertools.count(0.0, seconds)
    monkeypatch.setattr(EngineRunner, "decode_steps", lambda self, *args: steps.append(args[2]) or decode(self, *args))
    monkeypatch.setattr(api.time, "perf_counter", lambda: next(clock))
    assert len(generate(compiled(), [[1, 2]], max_new_tokens=50)[0]) == 52 and steps == expected


def test_an_interrupt_ends_a_multi_token_step():
    model, draws = compiled(), [SamplingParams(1.0, 0, 1.0, n, 0) for n in range(2)]
    runner = model.runner(4)
    whole, parts = runner.allocate(2), runner.allocate(2)
    prompts = [[1, 2], [3]]
    expected = runner.decode_steps(whole, runner.extend(whole, prompts), 6, draws)
    runner.interrupt()
    first = runner.decode_steps(parts, runner.extend(parts, prompts), 6, draws)
    assert [len(tokens) for tokens in first] == [1, 1]
    rest = runner.decode_steps(parts, runner.extend(parts, first), 5, draws)
    assert [a + b for a, b in zip(first, rest, strict=True)] == expected, "once is enough"


def test_sample_refuses_logits_of_another_shape():
    runner = compiled().runner(1)
    for logits in (torch.zeros(1, 300), torch.zeros(2, 301), torch.zeros(1, 301, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"sample: logits has shape .*; expected \(1, 301\), torch.float32"):
            runner.sample(logits, [SamplingParams(0.0, 0, 1.0, 0, 0)], [0])


@pytest.mark.parametrize("max_tokens", [1, 4])
def test_nan_in_one_row_ends_that_request_alone(max_tokens, monkeypatch):
    running = requests_of([{}] * 3, compiled())
    extend = EngineRunner.extend

    def damaged(self, rows, tokens, last_only=True):
        logits = extend(self, rows, tokens, last_only)
        logits[1, 7] = float("nan")
        return logits

    monkeypatch.setattr(EngineRunner, "extend", damaged)
    bad = running._waiting[1]
    running.step(max_tokens)
    monkeypatch.setattr(EngineRunner, "extend", extend)
    assert "the logits hold nan" in str(bad.error) and bad.done and running.running == 2
    run(running)


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
def test_torch_uses_one_thread_while_the_engine_runs(options, monkeypatch):
    """Its others would go on spinning on the engine's cores; afterwards everything is as it was."""
    seen = threads_seen(monkeypatch, (decoding, "_details"), (beam, "_logprobs"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compiled().generate([[1, 2, 3]], max_new_tokens=3, **options)
        assert seen == [1] * 3 and torch.get_num_threads() == 2
        seen.clear()
        monkeypatch.setattr("gptfast.models.gpt.engine_for", lambda model: None)
        generate(model_of("gpt2"), [[1, 2, 3]], max_new_tokens=3, **options)
        assert seen == [2] * 3, "a GPT computes on torch's threads"
    finally:
        torch.set_num_threads(before)


def test_threads_come_back_after_an_error(monkeypatch):
    monkeypatch.setattr(decoding, "choose", None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(TypeError):
            compiled().generate([[1]], max_new_tokens=3, min_p=0.1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
