"""Generation on a GPU that waits for the host once in BURST tokens: a step of all rows reads and writes tensors at fixed
addresses only - ids, lengths, keys, values, drawn tokens - and is captured in a CUDA graph for each batch bucket.

A row's tokens are those of the ordinary loop (`scheduler`): the draw of a token depends on (seed, stream, position). Rows
go on to the end of a burst after they have ended; what they got too much is thrown away.
B rows, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gptfast import ops
from gptfast._warn import warn
from gptfast.backend import resolve
from gptfast.generation.config import GenerationConfig
from gptfast.generation.request import Request, Row
from gptfast.generation.sampling import FAULTS, processors
from gptfast.generation.torch_runner import for_generation
from gptfast.nn.difference import difference
from gptfast.nn.kv_cache import KVCache
from gptfast.ops.causal_attention import trusted

if TYPE_CHECKING:
    from gptfast.nn.transformer import Transformer

BURST = 16  # tokens of each row between two looks at them
KERNELS = ("embedding", "add_layer_norm", "layer_norm", "causal_attention", "sample")  # none of which waits


def takes(model: Any, requests: list[Request]) -> TypeGuard[Transformer]:
    """Whether `run` can make what the requests of one `generate` ask for: a GPT on a GPU with the CUDA kernels, without
    banded layers, where tokens depend on logits and counters alone."""
    from gptfast.nn.transformer import Transformer

    if not isinstance(model, Transformer) or not model.wte.weight.is_cuda or torch.is_autocast_enabled("cuda"):
        return False
    with _current(model.wte.weight.device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing or not _simple(requests):
        return False
    if difference(model) is not None:  # a captured step is of the modules as they were
        return False
    banded = any(model.config.window_of(layer) is not None for layer in range(model.config.n_layer))
    return not banded and all(resolve(op, None, model.wte.weight) == "cuda" for op in KERNELS)


def _current(device: torch.device) -> AbstractContextManager:
    """The model's GPU is the current one inside: captures, and the streams that they look at, are of the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """torch has one for the whole process, on the GPU that captured first."""
    return torch.cuda.Stream(device)


def _simple(requests: list[Request]) -> bool:
    """No option needs the host between two tokens, and every text fits into the context."""
    config = requests[0].config
    changed = bool(processors(config)) or config.min_p > 0 or config.prompt_lookup_num_tokens > 0
    return not changed and not any(request.logprobs or request.top for request in requests)


def run(model: Transformer, requests: list[Request], decoder: Decoder | None = None) -> None:
    """Give the requests their rows, all tokens made. `decoder`: None: the model's own, which it keeps."""
    config = requests[0].config
    rows = sum(request.config.num_return_sequences for request in requests)
    longest = max(len(request.prompt) for request in requests) + config.max_new_tokens
    with for_generation(model):
        decoder = decoder or _decoder_of(model, rows, longest)
        with _current(decoder.device):
            live = decoder.read(model, requests)
            made, limit = 0, config.max_new_tokens
            while live:
                count = min(BURST, limit - made)
                tokens = decoder.burst(model, count, _sampling(config), last=made + count == limit)
                made += count
                for row in live:
                    _take(row, tokens[row.index])
                if any(row.request.error is not None for row in live):
                    return
                live = [row for row in live if not row.finish]
                decoder.gather(live)


def _take(row: Row, new: list[int]) -> None:
    """Append new tokens up to the end of the row."""
    for token in new:
        if token < 0:
            row.request.error, row.finish = RuntimeError(FAULTS[token]), "error"
        else:
            row.tokens.append(token)
            row.finish = row.request.stopping.reason(row.new)
        if row.finish:
            return


def _sampling(config: GenerationConfig) -> dict[str, Any]:
    vocab = {"vocab": config.usable_vocab} if config.usable_vocab else {}
    if not config.draws:
        return {"temperature": 0.0, **vocab}
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    options["seed"] = config.seed or 0
    return {**options, **vocab}


def bucket_of(rows: int) -> int:
    """The least power of two that is not below."""
    return 1 << (rows - 1).bit_length()


class StepCache(KVCache):
    """The first rows of a cache for steps of one token each, at positions that only the GPU knows."""

    def __init__(self, store: KVCache, rows: int, lengths: Tensor) -> None:
        self.k, self.v = store.k.narrow(1, 0, rows), store.v.narrow(1, 0, rows)  # L B H S_max D
        self.lengths = lengths  # (B,), brought up to date in place
        self._rows = torch.arange(rows, device=lengths.device)

    def start(self, T: int) -> Tensor:
        if T != 1:
            raise ValueError(f"StepCache: {T} new positions a row; expected 1 - read prompts through KVCache")
        self._layer = 0
        self._at = self.lengths.clamp(max=self.max_len - 1)  # rows that have ended may want to go on past the end
        self._seen = trusted(self._at + 1)
        return self._at.unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        layer = self.take_layer(k)
        keys, values = self.k.select(0, layer), self.v.select(0, layer)
        for stored, new in ((keys, k), (values, v)):
            stored.transpose(1, 2).index_put_((self._rows, self._at), new.squeeze(2).to(stored.dtype))  # B H D
        return ops.causal_attention(q.to(keys.dtype), keys, values, seq_lens=self._seen).to(q.dtype)

    def finish(self, T: int) -> None:
        self.lengths.add_(T)


@dataclass(frozen=True)
class State:
    """What a step of B rows reads and writes, besides keys and values."""

    lengths: Tensor  # (B,) int64: positions in the cache
    ids: Tensor  # (B,) int64: the last token
    streams: Tensor  # (B,) int64
    logits: Tensor  # (B, V) fp32: of what follows the positions in the cache
    drawn: Tensor  # (B, BURST) int64: the tokens of this burst
    column: Tensor  # (1,) int64: how many of them there are

    def rows(self, count: int) -> State:
        lengths, ids, streams, logits, drawn = (x.narrow(0, 0, count) for x in self.per_row())
        return State(lengths, ids, streams, logits, drawn, self.column)

    def per_row(self) -> tuple[Tensor, ...]:
        return self.lengths, self.ids, self.streams, self.logits, self.drawn


class Decoder:
    """Room for running rows of one model, and its captured steps.

    Args:
        model: a GPT.
        rows, max_len: the most rows, and positions of a row.
    """

    def __init__(self, model: Transformer, rows: int, max_len: int) -> None:
        weight, self._rows = model.wte.weight, bucket_of(rows)
        self.device = weight.device
        self.store = KVCache(model.config, self._rows, max_len, weight.dtype, weight.device)
        for stored in (self.store.k, self.store.v):
            stored.zero_()  # rows of the bucket that nobody has are read too
        self.config, self.weights = model.config, _addresses(model)
        self.bucket = 0
        self._graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}  # None: cannot be captured
        self._pool = torch.cuda.graph_pool_handle() if weight.is_cuda else None  # shared: one graph runs at a time
        whole = self._whole = {"dtype": torch.int64, "device": weight.device}
        lengths, ids, streams = torch.zeros(3, self._rows, **whole).unbind()
        logits = torch.zeros(self._rows, model.config.vocab_size, dtype=torch.float32, device=weight.device)
        drawn, column = torch.zeros(self._rows, BURST, **whole), torch.zeros(1, **whole)
        self.state = State(lengths, ids, streams, logits, drawn, column)

    def fits(self, model: Transformer, rows: int, max_len: int) -> bool:
        """Whether it has the room, and the model its config, and its weights where they were."""
        same = self.config == model.config and self.weights == _addresses(model)
        return same and rows <= self._rows and max_len <= self.store.max_len

    def read(self, model: Transformer, requests: list[Request]) -> list[Row]:
        """Read the prompts, one by one, into the first rows; returns these."""
        rows: list[Row] = []
        for request in requests:
            first, copies = len(rows), range(request.config.num_return_sequences)
            prompt = torch.tensor([request.prompt], dtype=torch.int64, device=self.store.k.device)
            cache = self.store.rows(first, first + 1, [0])
            logits = model(prompt, cache=cache, last_only=True)
            self.store.copy_rows([first + n for n in copies[1:]], [first] * len(copies[1:]), prompt.shape[1])
            self.state.logits[first : first + len(copies)] = logits.float()
            request.rows = [Row(request, n, first + n, list(request.prompt)) for n in copies]
            rows += request.rows
        for name, values in (
            ("lengths", [len(row.tokens) for row in rows]),
            ("streams", [row.request.first_stream + row.stream for row in rows]),
        ):
            getattr(self.state, name)[: len(rows)] = torch.tensor(values, **self._whole)
        self.bucket = bucket_of(len(rows))
        return rows

    def burst(self, model: Transformer, count: int, sampling: dict[str, Any], last: bool) -> list[list[int]]:
        """The next `count` tokens of every row of the bucket; the one place that waits. `last`: none will follow."""
        self.state.column.zero_()
        draw, forward = partial(self.draw, sampling), partial(self.forward, model)
        drawing = self._graph_of("draw", tuple(sampling.items()), draw)
        reading = self._graph_of("forward", (), forward)
        for n in range(count):
            drawing.replay() if drawing else draw()
            if not last or n + 1 < count:
                reading.replay() if reading else forward()
        return self.state.drawn[: self.bucket, :count].tolist()

    def draw(self, sampling: dict[str, Any]) -> None:
        """A token of every row from its logits."""
        state, options = self.state.rows(self.bucket), dict(sampling)
        logits = state.logits.narrow(1, 0, options.pop("vocab", state.logits.shape[1]))
        ids = ops.sample(logits, **options, position=state.lengths, stream=state.streams)
        state.ids.copy_(ids)
        state.drawn.index_copy_(1, state.column, ids.unsqueeze(1))
        state.column.add_(1)

    def forward(self, model: Transformer) -> None:
        """The logits of what follows every row's last token, which enters the cache."""
        state = self.state.rows(self.bucket)
        cache = StepCache(self.store, self.bucket, state.lengths)
        state.logits.copy_(model(state.ids.unsqueeze(1), cache=cache).squeeze(1))

    def gather(self, rows: list[Row]) -> None:
        """These rows go on. They move together where a smaller bucket then holds them; else the others run along."""
        if not rows or bucket_of(len(rows)) == self.bucket:
            return
        old, count = [row.index for row in rows], len(rows)
        self.store.copy_rows(list(range(count)), old, max(len(row.tokens) for row in rows))
        for x in self.state.per_row():
            x[:count] = x[old]
        for n, row in enumerate(rows):
            row.index = n
        self.bucket = bucket_of(count)

    def _graph_of(self, name: str, options: tuple, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The captured step for the present bucket; None where there is no GPU, or it cannot capture this."""
        if self.device.type != "cuda":
            return None
        key = (name, options, self.bucket)
        if key not in self._graphs:
            for other in [k for k in self._graphs if k[0] == name and k[1] != options]:
                del self._graphs[other]  # one kind of drawing at a time: seeds come and go
            self._graphs[key] = self._captured(step)
        return self._graphs[key]

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.stream(stream):  # a capture that fails leaves its own as the current one
                with self._undone():
                    side = torch.cuda.Stream(self.device)
                    side.wait_stream(stream)
                    with torch.cuda.stream(side):
                        step()  # what libraries set up when they first run cannot be captured
                    stream.wait_stream(side)
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    with torch.cuda.graph(graph, pool=self._pool, stream=_capture_stream(self.device)):
                        step()
            if empty := [str(w.message) for w in told if "Graph is empty" in str(w.message)]:
                raise RuntimeError(empty[0])  # its replays would do nothing
        except RuntimeError as error:
            warn(f"generate: no CUDA graph of a step, which runs uncaptured: {error}")
            return None
        for w in told:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return graph

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Restore the state afterwards. What was stored behind a row's length stays: it is overwritten anyway."""
        tensors = (*self.state.per_row(), self.state.column)
        before = [x.clone() for x in tensors]
        try:
            yield
        finally:
            for x, old in zip(tensors, before, strict=True):
                x.copy_(old)


def _addresses(model: Transformer) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))


_decoders: WeakKeyDictionary[Transformer, Decoder] = WeakKeyDictionary()


def _decoder_of(model: Transformer, rows: int, max_len: int) -> Decoder:
    """The model's decoder; a new one where the old has not the room or the weights have moved."""
    decoder = _decoders.get(model)
    if decoder is None or not decoder.fits(model, rows, max_len):
        _decoders.pop(model, None)
        room = min(-(-max_len // 256) * 256, model.config.block_size)
        decoder = _decoders[model] = Decoder(model, rows, room)
    return decoder
