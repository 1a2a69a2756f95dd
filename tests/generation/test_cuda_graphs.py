"""`CudaGraphRunner` without a GPU: its steps, uncaptured, give the tokens of the others; on fake CUDA tensors none of them
waits for a value."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import gptfast
from gptfast.generation import GenerationConfig, Request, Scheduler, captured_steps, stream
from gptfast.generation.captured_steps import MAX_TOKENS, CapturedSteps, StaticKVCache
from gptfast.generation.cuda_graphs import CudaGraphRunner
from tests.support.captured import PROMPTS, Captured, captured_tokens
from tests.support.cuda_models import tiny
from tests.support.schedulers import run


@pytest.mark.parametrize("backend", ["cpu", "emu"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "max_new_tokens": 17},  # one more than a call makes
        {"temperature": 0.9, "top_k": 20, "seed": 3, "max_new_tokens": 5, "num_return_sequences": 3},
        {"top_p": 0.8, "seed": 2**63 + 1, "max_new_tokens": 16},
    ],
    ids=["greedy", "three a prompt", "nucleus"],
)
def test_tokens_are_those_of_the_ordinary_loop(options, backend, emu):
    model = tiny().eval()
    with gptfast.backend(backend):
        expected = model.generate(PROMPTS, **options)
        assert captured_tokens(model, PROMPTS, **options) == expected


def test_rows_end_at_different_places():
    """At an end token; the others move together into smaller buckets, and go on as before."""
    model = tiny(n_layer=1, block_size=90).eval()
    options = {"seed": 7, "max_new_tokens": 80, "eos_token_id": [7]}
    expected = model.generate(PROMPTS, **options)
    ends = sorted(len(tokens) - len(prompt) for tokens, prompt in zip(expected, PROMPTS, strict=True))
    assert ends[0] <= MAX_TOKENS < 2 * MAX_TOKENS < ends[-1], f"nothing is tested: {ends}"
    assert captured_tokens(model, PROMPTS, **options) == expected


def test_up_to_the_end_of_the_context():
    """Sequences that have ended run along to the end of the call, past the last position."""
    model = tiny().eval()
    prompts, options = [[1] * 14, [2] * 3], {"temperature": 0.0, "max_new_tokens": 10}
    assert captured_tokens(model, prompts, **options) == model.generate(prompts, **options)
    early = {**options, "eos_token_id": model.generate(prompts[:1], **options)[0][15]}
    assert captured_tokens(model, prompts, **early) == model.generate(prompts, **early)


MIXED = [
    {"temperature": 0.0},
    {"seed": 1, "top_k": 5},
    {"seed": 1, "top_k": 5, "repetition_penalty": 1.4},
    {"min_p": 0.1, "seed": 4},
    {"prompt_lookup_num_tokens": 2},
    {"seed": 2, "num_return_sequences": 2},
]


@pytest.mark.parametrize("max_tokens", [1, 4, 16])
def test_requests_with_other_options_share_the_captured_forward(max_tokens, monkeypatch):
    """Requests join and leave: draws that need the host are not captured, and every text is that of its single run."""
    model, captured = tiny(n_layer=1, block_size=60).eval(), []
    forward = CapturedSteps.forward
    monkeypatch.setattr(CapturedSteps, "forward", lambda self, model: captured.append(1) or forward(self, model))
    scheduler = Scheduler(Captured(model), max_rows=4)
    requests = [scheduler.submit(PROMPTS[n % 5], max_new_tokens=9 + n, **options) for n, options in enumerate(MIXED)]
    while scheduler.waiting or scheduler.running:
        scheduler.step(max_tokens)
    assert len(captured) > 9
    for n, (request, options) in enumerate(zip(requests, MIXED, strict=True)):
        expected = model.generate([PROMPTS[n % 5]], max_new_tokens=9 + n, **options)
        assert [sequence.tokens for sequence in request.sequences] == expected


PARAMETERS = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_k": 5},
    {"temperature": 1.4, "top_p": 0.6, "seed": 2**64 - 1},
]


@pytest.mark.parametrize("backend", ["cpu", "emu"])
def test_draws_with_other_parameters_are_captured_together(backend, emu, monkeypatch):
    """One call of 16 tokens for all, though no two sequences are drawn alike: none of them takes the step of one token."""
    monkeypatch.setattr(CudaGraphRunner, "sample", None)
    model = tiny(n_layer=1, block_size=60).eval()
    with gptfast.backend(backend):
        scheduler = Scheduler(Captured(model), max_rows=len(PARAMETERS))
        requests = [scheduler.submit([1, 2, 3], max_new_tokens=14, **options) for options in PARAMETERS]
        run(scheduler)
        for request, options in zip(requests, PARAMETERS, strict=True):
            expected = model.generate([[1, 2, 3]], max_new_tokens=14, **options)
            assert [sequence.tokens for sequence in request.sequences] == expected


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.2}, {"overflow": "slide", "max_new_tokens": 30}, {"num_beams": 3}, {"stop_strings": "!"}],
    ids=str,
)
def test_other_options_run_on_it_too(options):
    letters = gptfast.tokenizer.CharTokenizer.train("".join(chr(33 + n) for n in range(61)))
    options = {"max_new_tokens": 8, **options, **({"tokenizer": letters} if "stop_strings" in options else {})}
    model = tiny().eval()
    assert captured_tokens(model, PROMPTS[:3], **options) == model.generate(PROMPTS[:3], **options)


def test_streams_and_assistants_run_on_it_too():
    model, options = tiny(n_layer=1, block_size=60).eval(), {"seed": 3, "max_new_tokens": 12}
    expected = list(stream(model, PROMPTS, logprobs=True, top=2, **options))
    got = list(stream(Captured(model), PROMPTS, logprobs=True, top=2, **options))
    assert [step.tokens for step in got] == [step.tokens for step in expected]
    captured = captured_tokens(model, PROMPTS, assistant_model=Captured(model), **options)
    assert captured == model.generate(PROMPTS, **options)


def test_steps_are_kept_for_the_next_runner_of_the_model_and_its_weights():
    model = tiny().eval()

    def steps_of(rows: int, length: int, model: gptfast.GPT = model) -> CapturedSteps:
        return CudaGraphRunner(model, rows, length)._steps

    steps = steps_of(3, 20)
    assert steps_of(4, 24) is steps, "the room is rounded up"
    assert steps_of(5, 20) is not steps
    one, two = CudaGraphRunner(model, 2, 20), CudaGraphRunner(model, 2, 20)
    assert one._steps is not two._steps, "they are in use"
    del one, two
    steps = steps_of(2, 20)
    assert steps._held == [], "steps that nobody uses do not hold the weights"
    model.wte.weight = torch.nn.Parameter(model.wte.weight.clone())
    assert steps_of(2, 20) is not steps, "a graph would read the old weights"
    count = len(captured_steps._kept)
    del model, steps, steps_of
    assert len(captured_steps._kept) == count - 1, "they die with the model"


def test_a_long_lived_runner_captures_anew_when_the_weights_have_moved():
    """The next prompt notices. Until then the graphs read the old weights, whose memory is held."""
    model = tiny().eval()
    scheduler = Scheduler(Captured(model), max_rows=2)
    steps = scheduler.runner._steps
    steps._graphs["forward", 0, 1] = None
    old = model.wte.weight
    model.wte.weight = model.lm_head.weight = torch.nn.Parameter(torch.randn_like(old))
    assert any(held.data_ptr() == old.data_ptr() for held in steps._held)
    request = scheduler.submit([1, 2], max_new_tokens=6)
    run(scheduler)
    assert not steps._graphs and request.sequences[0].tokens == model.generate([[1, 2]], max_new_tokens=6)[0]


def test_a_cpu_model_and_a_capture_of_the_caller_are_left_to_torch(monkeypatch):
    assert not CudaGraphRunner.supports(tiny().eval())
    monkeypatch.setattr("gptfast.generation.cuda_graphs._may_capture", lambda device: False)
    model, steps = tiny().eval(), []
    monkeypatch.setattr(CapturedSteps, "_run", lambda self, *_: steps.append(1))
    assert captured_tokens(model, PROMPTS, max_new_tokens=5) == model.generate(PROMPTS, max_new_tokens=5)
    assert not steps


@pytest.mark.parametrize(("code", "text"), [(-1, "the logits hold nan"), (-2, "no token is left")])
def test_an_error_code_ends_its_request_alone(code, text, monkeypatch):
    """As a captured draw gives it, in the middle of a call of several tokens."""
    model = tiny(n_layer=1, block_size=60).eval()
    sample_step, count = CapturedSteps.sample_step, [0]

    def damaged(self, vocab):
        sample_step(self, vocab)
        count[0] += 1
        if count[0] == 6:
            self.buffers.drawn[1, self.buffers.column - 1] = code

    monkeypatch.setattr(CapturedSteps, "sample_step", damaged)
    scheduler = Scheduler(Captured(model), max_rows=2)
    good, failed = (scheduler.submit(prompt, max_new_tokens=20) for prompt in PROMPTS[:2])
    while scheduler.waiting or scheduler.running:
        scheduler.step(16)
    assert text in str(failed.error) and len(failed.sequences[0].new) == 5 and failed.done
    assert good.sequences[0].tokens == model.generate(PROMPTS[:1], max_new_tokens=20)[0]


def test_steps_are_of_one_token():
    steps = CapturedSteps(tiny().eval(), 1, 8)
    cache = StaticKVCache(steps.cache, 1, steps.buffers.inputs[0], steps._counters)
    with pytest.raises(ValueError, match="StaticKVCache: 2 new positions a row; expected 1"):
        cache.start(2)


@pytest.mark.parametrize("vocab", [0, 50], ids=["all", "of the tokenizer"])
def test_no_step_waits_for_the_gpu(vocab, on_fake_gpu, monkeypatch):
    """A value that Python asked for, as by `.item()`, would raise here."""
    monkeypatch.setattr(captured_steps, "addresses_of", lambda model: ())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    # the method asks for a driver, even of fake tensors
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: torch.ops.aten.copy_.default(to, x))
    model = on_fake_gpu.eval()
    assert CudaGraphRunner.supports(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not CudaGraphRunner.supports(model)
    model.h[0].ln_1.eps = 1.0
    assert not CudaGraphRunner.supports(model), "the config says another"
    model.h[0].ln_1.eps = model.config.layer_norm_epsilon
    steps = CapturedSteps(model, 3, 20)
    steps.bucket = 4
    steps.sample_step(vocab)
    steps.forward_step(model)
    assert steps.buffers.logits.device.type == "cuda"
    with pytest.raises(RuntimeError):
        steps.buffers.column.item()


def test_a_gpt_on_a_gpu_generates_serves_and_streams_in_captured_steps(on_fake_gpu, monkeypatch):
    """Every way of generation asks the model for its runner."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    made = []

    def make(self, model, slots, length):
        self._model = model
        made.append((slots, length))

    monkeypatch.setattr(CudaGraphRunner, "__init__", make)
    model = on_fake_gpu.eval()
    assert type(model.runner(3, 8)) is CudaGraphRunner
    scheduler = Scheduler(model, max_rows=5)
    assert type(scheduler.runner) is CudaGraphRunner and made == [(3, 8), (5, model.config.block_size)]
    config = GenerationConfig(max_new_tokens=2)
    assert scheduler.submit_request(Request([1], config)).config.max_new_tokens == 2
