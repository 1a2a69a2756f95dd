"""Captured generation on a machine with several GPUs, on a model of CUDA's streams and captures: a current GPU, a current
stream of each, and graphs that get what is launched on the stream they capture. What is launched elsewhere just runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

import gptfast
from gptfast.generation import cuda_graphs
from tests.support.captured import PROMPTS, requests_of
from tests.support.cuda_models import tiny


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
    cuda_graphs._capture_stream.cache_clear()
    yield machine
    cuda_graphs._capture_stream.cache_clear()
    assert machine.current == 0 and [s.device for s in machine.streams] == [0, 1, 2]


def decoder_on(machine: Machine, gpu: int, model: gptfast.GPT, rows: int) -> cuda_graphs.Decoder:
    """A decoder whose kernels are launched on the current stream of that GPU."""
    decoder = cuda_graphs.Decoder(model, rows, model.config.block_size)
    decoder.device = torch.device("cuda", gpu)
    for name in ("draw", "forward"):
        step = getattr(decoder, name)
        launch = lambda *args, step=step: machine.launch(gpu, lambda: step(*args))  # noqa: E731
        setattr(decoder, name, launch)
    return decoder


def tokens(model: gptfast.GPT, decoder: cuda_graphs.Decoder, **options) -> list[list[int]]:
    requests = requests_of(PROMPTS, **options)
    cuda_graphs.run(model, requests, decoder)
    return [row.tokens for request in requests for row in request.rows]


OPTIONS = {"temperature": 0.9, "seed": 3, "max_new_tokens": 12}


def test_models_on_gpus_that_are_not_current(machine):
    """One after the other, on three GPUs; every step is in a graph."""
    for gpu in (1, 0, 2):
        model = tiny().eval()
        decoder = decoder_on(machine, gpu, model, len(PROMPTS))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tokens(model, decoder, **OPTIONS) == model.generate(PROMPTS, **OPTIONS)
        assert len(decoder._graphs) == 2
        assert all(graph is not None and len(graph.steps) == 1 for graph in decoder._graphs.values())


def test_an_empty_graph_is_not_replayed(machine, monkeypatch):
    """Its replays do nothing: the steps run uncaptured, and that is said."""
    monkeypatch.setattr(machine, "launch", lambda gpu, step: step())  # on a stream that nobody captures
    model = tiny().eval()
    decoder = decoder_on(machine, 1, model, len(PROMPTS))
    monkeypatch.setattr(decoder, "_captured", keeping_state(decoder))
    with pytest.warns(UserWarning, match="generate: no CUDA graph of a step, which runs uncaptured: The CUDA Graph is"):
        assert tokens(model, decoder, **OPTIONS) == model.generate(PROMPTS, **OPTIONS)
    assert set(decoder._graphs.values()) == {None}


def keeping_state(decoder: cuda_graphs.Decoder) -> Callable:
    """Capturing in which nothing runs for good, though the machine above runs what it does not capture."""

    def captured(step: Callable[[], None]) -> object:
        with decoder._undone():
            return cuda_graphs.Decoder._captured(decoder, step)

    return captured


def test_a_capture_that_fails_leaves_the_current_stream(machine):
    machine.refuse = True
    model = tiny().eval()
    decoder, before = decoder_on(machine, 1, model, len(PROMPTS)), list(machine.streams)
    with pytest.warns(UserWarning, match="runs uncaptured: capture failed"):
        assert tokens(model, decoder, **OPTIONS) == model.generate(PROMPTS, **OPTIONS)
    assert machine.streams == before


def test_other_warnings_of_a_capture_are_passed_on(machine):
    decoder = decoder_on(machine, 1, tiny().eval(), 1)

    def step() -> None:
        machine.launch(1, lambda: None)
        warnings.warn("something else", stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        assert decoder._captured(step) is not None


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
    model = tiny().eval()
    monkeypatch.setattr(cuda_graphs, "_current", lambda device: machine.device(torch.device("cuda", 2)))
    monkeypatch.setattr(type(model.wte.weight), "is_cuda", True, raising=False)
    assert not cuda_graphs.takes(model, requests_of([[1]]))
    assert asked == [2]
