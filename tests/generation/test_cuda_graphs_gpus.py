"""Captured generation on a machine with several GPUs, on a model of CUDA's streams and captures: a current GPU, a current
stream of each, and graphs that get what is launched on the stream they capture. What is launched elsewhere just runs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from gptfast.generation import Scheduler, captured_steps, cuda_graphs, generate, stream
from gptfast.generation.captured_steps import CapturedSteps
from gptfast.generation.cuda_graphs import CudaGraphRunner
from gptfast.tokenizer import CharTokenizer
from tests.support.captured import PROMPTS, Captured
from tests.support.cuda_models import tiny
from tests.support.schedulers import run


@dataclass(eq=False)
class Stream:
    device: int

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device, "nothing is launched on the other GPU"


@dataclass(eq=False)
class Graph:
    steps: list[Callable[[], None]] = field(default_factory=list)

    def replay(self) -> None:
        for step in self.steps:
            step()


class Machine:
    """Three GPUs, of which number 0 is current."""

    def __init__(self) -> None:
        self.current, self.streams = 0, [Stream(0), Stream(1), Stream(2)]
        self.capture: tuple[Stream, Graph] | None = None
        self.default_capture_stream: Stream | None = None
        self.refuse = False

    def launch(self, gpu: int, step: Callable[[], None]) -> None:
        if self.capture and self.capture[0] is self.streams[gpu]:
            self.capture[1].steps.append(step)
        else:
            step()

    def of(self, device: torch.device | None) -> int:
        return self.current if device is None or device.index is None else device.index

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, self.of(device)
        yield
        self.current = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current, self.streams[stream.device]
        self.current, self.streams[stream.device] = stream.device, stream
        try:
            yield
        finally:
            self.current, self.streams[stream.device] = before

    @contextmanager
    def graph(self, graph: Graph, pool: object = None, stream: Stream | None = None) -> Iterator[None]:
        if stream is None:
            self.default_capture_stream = self.default_capture_stream or Stream(self.current)
            stream = self.default_capture_stream
        before = self.current, self.streams[stream.device]
        self.current, self.streams[stream.device], self.capture = stream.device, stream, (stream, graph)
        yield
        self.capture = None
        if self.refuse:  # as torch does: the stream stays
            raise RuntimeError("capture failed")
        if not graph.steps:
            warnings.warn("The CUDA Graph is empty. This usually means that the graph was attempted", stacklevel=2)
        self.current, self.streams[stream.device] = before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    for name, value in {
        "device": machine.device,
        "stream": machine.stream,
        "graph": machine.graph,
        "Stream": lambda device=None: Stream(machine.of(device)),
        "current_stream": lambda device=None: machine.streams[machine.of(device)],
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    captured_steps._capture_stream.cache_clear()
    yield machine
    captured_steps._capture_stream.cache_clear()
    assert machine.current == 0 and [s.device for s in machine.streams] == [0, 1, 2]


class OnGpu(Captured):
    """A model whose steps are launched on the current stream of a GPU."""

    def __init__(self, machine: Machine, gpu: int) -> None:
        super().__init__(tiny().eval())
        self.machine, self.gpu = machine, gpu

    @property
    def steps(self) -> CapturedSteps:
        return self.runners[-1]._steps

    def runner(self, max_slots: int, max_len: int) -> CudaGraphRunner:
        runner = super().runner(max_slots, max_len)
        steps, runner.runner = runner._steps, self.runner
        steps.device = torch.device("cuda", self.gpu)
        for name in ("sample_step", "forward_step"):
            step = getattr(steps, name)
            launch = lambda *args, step=step: self.machine.launch(self.gpu, lambda: step(*args))  # noqa: E731
            setattr(steps, name, launch)
        return runner

    def tokens(self) -> list[list[int]]:
        return generate(self, PROMPTS, **OPTIONS)

    def expected(self) -> list[list[int]]:
        return self.model.generate(PROMPTS, **OPTIONS)


OPTIONS = {"temperature": 0.9, "seed": 3, "max_new_tokens": 12}


@pytest.fixture(autouse=True)
def _no_capture_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_models_on_gpus_that_are_not_current(machine):
    """One after the other, on three GPUs; every step is in a graph."""
    for gpu in (1, 0, 2):
        model = OnGpu(machine, gpu)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model.tokens() == model.expected()
        graphs = model.steps._graphs
        assert {name for name, _, _ in graphs} == {"sample", "forward"}
        assert all(graph is not None and len(graph.steps) == 1 for graph in graphs.values())


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that were replayed."""
    graphs: list[Graph] = []
    replay = Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self: graphs.append(self) or replay(self))
    return graphs


def test_streams_and_schedulers_replay_captured_steps(machine, replayed):
    """Draws that are not captured come with forward passes that are."""
    model = OnGpu(machine, 1)
    for step in stream(model, PROMPTS, **OPTIONS):
        assert len(step.tokens) == 5
    assert len(replayed) == 12 + 11 + 1, "draws, forward passes, and the prompt of one token"
    replayed.clear()
    scheduler = Scheduler(model, max_rows=3)
    requests = [scheduler.submit(prompt, **OPTIONS) for prompt in PROMPTS]
    run(scheduler)
    assert [sequence.tokens for request in requests for sequence in request.sequences] == model.expected()
    assert len(replayed) >= 2 * 11
    replayed.clear()
    scheduler.submit([1, 2], repetition_penalty=1.3, max_new_tokens=5)
    run(scheduler)
    assert len(replayed) == 4


def test_new_parameters_capture_nothing(machine, monkeypatch):
    """A seed, a temperature or a cut is a number that the captured draw reads. Only a bucket, or a vocabulary, is a new graph."""
    captured, capture = [], CapturedSteps._captured
    monkeypatch.setattr(CapturedSteps, "_captured", lambda self, step: captured.append(1) or capture(self, step))
    model = OnGpu(machine, 1)

    def drawn(prompts: list[list[int]], **options: object) -> list[list[int]]:
        model.runners.clear()  # the next runner takes the steps of the last
        gc.collect()
        return generate(model, prompts, **options)

    for n, options in enumerate(
        [{"seed": 3}, {"seed": 4}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5, "seed": 2**63}]
    ):
        asked = {"max_new_tokens": 5, "temperature": 0.9, "seed": 7} | options
        assert drawn(PROMPTS[:3], **asked) == model.model.generate(PROMPTS[:3], **asked)
        assert len(captured) == 2, f"captures after call {n}"
    drawn(PROMPTS[:3], max_new_tokens=5, usable_vocab=40)
    assert len(captured) == 3, "the draw among 40 ids"
    drawn(PROMPTS[:1], max_new_tokens=5, usable_vocab=40)
    assert len(captured) == 5, "a bucket of one sequence"


def test_the_server_replays_captured_steps(machine, replayed):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from gptfast.serving.app import create_app

    model, letters = OnGpu(machine, 1), CharTokenizer.train("".join(chr(33 + n) for n in range(61)))
    with TestClient(create_app(model, letters, "tiny")) as client:
        ask = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 12, "temperature": 0.9, "seed": 3}
        answer = client.post("/v1/completions", json=ask).json()
    assert answer["choices"][0]["text"] == letters.decode(model.expected()[0][3:])
    assert len(replayed) == 12 + 11


def test_an_empty_graph_is_not_replayed(machine, monkeypatch):
    """Its replays do nothing: the steps run uncaptured, with a warning."""
    monkeypatch.setattr(machine, "launch", lambda gpu, step: step())  # on a stream that nobody captures
    captured = CapturedSteps._captured

    def keeping_buffers(self: CapturedSteps, step: Callable[[], None]) -> object:
        """Nothing runs for good in a capture, though the machine above runs what it does not capture."""
        with self._undone():
            return captured(self, step)

    monkeypatch.setattr(CapturedSteps, "_captured", keeping_buffers)
    model = OnGpu(machine, 1)
    with pytest.warns(UserWarning, match="generate: no CUDA graph of a step, which runs uncaptured: The CUDA Graph is"):
        assert model.tokens() == model.expected()
    assert set(model.steps._graphs.values()) == {None}


def test_a_capture_that_fails_leaves_the_current_stream(machine):
    machine.refuse = True
    model, before = OnGpu(machine, 1), list(machine.streams)
    with pytest.warns(UserWarning, match="runs uncaptured: capture failed"):
        assert model.tokens() == model.expected()
    assert machine.streams == before


def test_other_warnings_of_a_capture_are_passed_on(machine):
    model = OnGpu(machine, 1)
    runner = model.runner(1, 8)

    def step() -> None:
        machine.launch(1, lambda: None)
        warnings.warn("something else", stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        assert runner._steps._captured(step) is not None


def test_bfloat16_is_asked_of_the_gpu_that_trains(monkeypatch):
    from gptfast.machine import choose_dtype

    machine = Machine()
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: machine.current == 1)
    assert choose_dtype("cuda:1")[0] == "bfloat16" and choose_dtype("cuda:2")[0] == "float32"


def test_what_captures_is_asked_of_the_model_s_gpu(machine, monkeypatch):
    """A capture on the current GPU is none on the model's."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(machine.current) or True)
    assert not cuda_graphs._may_capture(torch.device("cuda", 2))
    assert asked == [2]
