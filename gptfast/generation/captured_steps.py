"""CapturedSteps: the two steps of generation on a GPU, draw and forward, in CUDA graphs over static buffers.

A step reads and writes tensors at fixed addresses only - ids, lengths, keys, values, logits, drawn tokens - and is captured
once for each bucket: the number of sequences, rounded up to a power of two.
B sequences, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast._warn import warn
from gptfast.generation.torch_runner import evaluating, make_cache
from gptfast.nn.kv_cache import KVCache
from gptfast.nn.transformer import Transformer

MAX_TOKENS = 16  # of each sequence between two waits for the GPU
GREEDY = ops.row_options(temperature=0.0)  # of rows that take no part in a draw


def current_gpu(device: torch.device) -> AbstractContextManager:
    """Makes the device the current GPU: captures, and the streams that they use, belong to the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """torch's own capture stream is one for the process, on the GPU that captured first."""
    return torch.cuda.Stream(device)


def bucket_of(rows: int) -> int:
    """The smallest power of two that is at least `rows`."""
    return 1 << (rows - 1).bit_length()


class StaticKVCache(KVCache):
    """The first rows of a cache, for steps of one token at positions that only the GPU knows."""

    def __init__(self, store: KVCache, rows: int, lengths: Tensor, counters: Tensor) -> None:
        self.k, self.v = store.k.narrow(1, 0, rows), store.v.narrow(1, 0, rows)  # L B H S_max D
        self.lengths = lengths  # (B,), updated in place
        self._counters = counters  # as `ops.append_and_attend` takes them

    def start(self, T: int) -> Tensor:
        if T != 1:
            raise ValueError(f"StaticKVCache: {T} new positions a row; expected 1 - read prompts through KVCache")
        self._layer = 0
        return self.lengths.clamp(max=self.max_len - 1).unsqueeze(1)  # rows that nobody uses may run past the end

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        layer = self.take_layer(k)
        keys, values = self.k.select(0, layer), self.v.select(0, layer)
        # The kernel before made q, k and v; lengths and cache are of earlier ones, which had ended when it began its work.
        options["cache_ready"] = True
        return ops.append_and_attend(q, k, v, keys, values, self.lengths, self._counters, **options).to(q.dtype)

    def finish(self, T: int) -> None:
        self.lengths.add_(T)


@dataclass(frozen=True)
class StaticBuffers:
    """What a step of B sequences reads and writes, besides keys and values."""

    loaded: Tensor  # (7 B,) int64: inputs and options, which the host sets in one copy
    logits: Tensor  # (B, V) fp32: of the token behind the positions in the cache
    drawn: Tensor  # (B, MAX_TOKENS) int64: tokens of this call
    column: Tensor  # (1,) int64: how many columns of `drawn` are filled

    @classmethod
    def make(cls, rows: int, V: int, device: torch.device) -> StaticBuffers:
        ints = {"dtype": torch.int64, "device": device}
        logits = torch.zeros(
            rows, -(-V // 32) * 32, dtype=torch.float32, device=device
        )  # rows start at whole 128 bytes
        drawn = torch.zeros(rows, MAX_TOKENS, **ints)
        return cls(torch.zeros(7 * rows, **ints), logits.narrow(1, 0, V), drawn, torch.zeros(1, **ints))

    @property
    def inputs(self) -> Tensor:
        """(3, B): number of positions in the cache, last token, Philox stream."""
        rows = self.drawn.shape[0]
        return self.loaded.narrow(0, 0, 3 * rows).view(3, rows)

    @property
    def options(self) -> Tensor:
        """(B, 4): how the next token of each row is drawn; see `ops.sample_rows`."""
        rows = self.drawn.shape[0]
        return self.loaded.narrow(0, 3 * rows, 4 * rows).view(rows, 4)

    def first(self, rows: int) -> tuple[Tensor, ...]:
        """lengths, ids, streams, logits, drawn of the first rows."""
        return (*self.inputs.narrow(1, 0, rows).unbind(), self.logits.narrow(0, 0, rows), self.drawn.narrow(0, 0, rows))


class CapturedSteps:
    """Static buffers and cache for the sequences of one model, and the steps captured on them.

    Args:
        model: a Transformer on a GPU. (On the CPU the steps run uncaptured.)
        rows: number of sequences.
        max_len: number of positions of a sequence.
    """

    def __init__(self, model: Transformer, rows: int, max_len: int) -> None:
        weight, self._rows = model.wte.weight, bucket_of(rows)
        self.device, self.config = weight.device, model.config
        self.cache = make_cache(model, self._rows, max_len)
        for stored in (self.cache.k, self.cache.v):
            stored.zero_()  # steps read the unused rows of their bucket, too
        self._counters = torch.zeros(self._rows * model.config.n_head, dtype=torch.int32, device=weight.device)
        self.bucket = 0
        self._addresses = addresses_of(model)
        self._held = _weights_of(model)  # what the graphs read stays there, also where the model gets other tensors
        self._graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}  # None: cannot be captured
        self._pool = torch.cuda.graph_pool_handle() if weight.is_cuda else None  # shared: one graph runs at a time
        self.buffers = StaticBuffers.make(self._rows, model.config.vocab_size, weight.device)

    def fits(self, model: Transformer, rows: int, max_len: int) -> bool:
        """Whether this has the room, and the model has its config, and its weights where they were."""
        same = self.config == model.config and self._addresses == addresses_of(model)
        return same and rows <= self._rows and max_len <= self.cache.max_len

    def follow(self, model: Transformer) -> None:
        """Drop the captured steps if the model's weights are in another place now."""
        if self._addresses != addresses_of(model):
            self._graphs.clear()
            self._addresses, self._held = addresses_of(model), _weights_of(model)

    def hold(self, model: Transformer | None) -> None:
        """Keep the memory of the model's weights from being freed while steps may run; None: none will."""
        self._held = [] if model is None else _weights_of(model)

    def load(
        self, columns: list[list[int]], options: list[tuple[int, ...]], rows: list[int], logits: Tensor | None
    ) -> None:
        """Set what the next step reads: the inputs, 3 lists of n, and the options, n rows of 4, of all rows in use, and the
        logits of `rows`. The bucket is the one of n."""
        self.bucket, unused = bucket_of(len(options)), self._rows - len(options)
        inputs = ([*column, *[0] * unused] for column in columns)
        numbers = [*chain(*inputs), *chain(*options, *[GREEDY] * unused)]
        self.buffers.loaded.copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
        if logits is not None:
            self.buffers.logits[self._index(rows)] = logits

    def logits_of(self, rows: list[int]) -> Tensor:
        """A copy of the logits of these rows."""
        index = self._index(rows)
        return self.buffers.logits[index].clone() if isinstance(index, slice) else self.buffers.logits[index]

    def _index(self, rows: list[int]) -> slice | Tensor:
        return slice(len(rows)) if rows == list(range(len(rows))) else torch.tensor(rows, device="cpu")

    def can_sample(self, vocab: int, model: Transformer) -> bool:
        """Whether draws of the first `vocab` ids (0: of all) are captured. Others wait for each token, and raise for one bad
        row."""
        if self.device.type != "cuda":
            return True  # in tests
        return self._graph("sample", vocab, partial(self.sample_step, vocab), model) is not None

    def decode(self, model: Transformer, count: int, vocab: int) -> list[list[int]]:
        """The next `count` tokens of every row of the bucket; the only place that waits for the GPU."""
        self.buffers.column.zero_()
        for n in range(count):
            self._run("sample", vocab, partial(self.sample_step, vocab), model)
            if n + 1 < count:
                self.forward(model)
        return self.buffers.drawn[: self.bucket, :count].tolist()

    def forward(self, model: Transformer) -> None:
        """Run the model on the last token of every row of the bucket."""
        self._run("forward", 0, partial(self.forward_step, model), model)

    def sample_step(self, vocab: int) -> None:
        """Draw a token of every row from its logits, by its options: what is captured."""
        lengths, ids, streams, logits, drawn = self.buffers.first(self.bucket)
        logits, options = logits.narrow(1, 0, vocab or logits.shape[1]), self.buffers.options.narrow(0, 0, self.bucket)
        new = ops.sample_rows(logits, options, position=lengths, stream=streams)
        ids.copy_(new)
        drawn.index_copy_(1, self.buffers.column, new.unsqueeze(1))
        self.buffers.column.add_(1)

    def forward_step(self, model: Transformer) -> None:
        """Append the last token of every row to the cache, and compute the logits behind it: what is captured."""
        lengths, ids, _, logits, _ = self.buffers.first(self.bucket)
        cache = StaticKVCache(self.cache, self.bucket, lengths, self._counters)
        logits.copy_(model(ids.unsqueeze(1), cache=cache).squeeze(1))

    def _run(self, name: str, vocab: int, step: Callable[[], None], model: Transformer) -> None:
        """Replay a step; run it where it cannot be captured."""
        with current_gpu(self.device):
            if graph := self._graph(name, vocab, step, model):
                return graph.replay()
            with evaluating(model):
                step()

    def _graph(
        self, name: str, vocab: int, step: Callable[[], None], model: Transformer
    ) -> torch.cuda.CUDAGraph | None:
        """The graph of a step for the present bucket, captured on its first use; None where it cannot be captured."""
        key = (name, vocab, self.bucket)
        if self.device.type == "cuda" and key not in self._graphs:
            for other in [k for k in self._graphs if k[0] == name and k[1] != vocab]:
                del self._graphs[other]  # one vocabulary at a time: that of the tokenizer
            with current_gpu(self.device), evaluating(model):
                self._graphs[key] = self._captured(step)
        return self._graphs.get(key)

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.stream(stream):  # a failed capture leaves its own stream as the current one
                with self._undone():
                    self.buffers.logits.zero_()  # a step that is not captured raises for bad ones
                    side = torch.cuda.Stream(self.device)
                    side.wait_stream(stream)
                    with torch.cuda.stream(side):
                        step()  # what libraries set up on their first call cannot be captured
                    stream.wait_stream(side)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    with torch.cuda.graph(graph, pool=self._pool, stream=_capture_stream(self.device)):
                        step()
            if empty := [str(w.message) for w in caught if "Graph is empty" in str(w.message)]:
                raise RuntimeError(empty[0])  # its replays would do nothing
        except RuntimeError as error:
            warn(f"generate: no CUDA graph of a step, which runs uncaptured: {error}")
            return None
        for w in caught:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return graph

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Restores the buffers afterwards; what was stored behind the length of a row is overwritten anyway."""
        tensors = (self.buffers.loaded, self.buffers.logits, self.buffers.drawn, self.buffers.column)
        before = [x.clone() for x in tensors]
        try:
            yield
        finally:
            for x, old in zip(tensors, before, strict=True):
                x.copy_(old)


def addresses_of(model: Transformer) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))


def _weights_of(model: Transformer) -> list[Tensor]:
    return [x.detach() for x in (*model.parameters(), *model.buffers())]


_kept: weakref.WeakKeyDictionary[Transformer, CapturedSteps] = weakref.WeakKeyDictionary()


def take_steps(model: Transformer, rows: int, max_len: int) -> CapturedSteps:
    """The steps that the model's last runner gave back, if they still fit, else new ones."""
    steps = _kept.pop(model, None)
    if steps is not None and steps.fits(model, rows, max_len):
        steps.hold(model)
        return steps
    room = max(
        max_len, min(-(-max_len // 256) * 256, model.config.block_size)
    )  # the next runner may need a little more
    return CapturedSteps(model, rows, room)


def give_back_steps(model: weakref.ref[Transformer], steps: CapturedSteps) -> None:
    """Keep the steps of a runner that has ended for the model's next one."""
    steps.hold(None)
    alive = model()
    if alive is not None:
        _kept[alive] = steps
