"""CudaGraphRunner: a `TorchRunner` whose steps of one token per sequence are replayed from CUDA graphs.

Lengths, ids and sampling parameters go to the GPU once per call, in one copy, and `decode_steps` waits for the GPU once for
all of its tokens. Sequences run on to the end of such a call after a stop token; what they get too much is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from gptfast import ops
from gptfast.backend import resolve
from gptfast.generation.captured_steps import GREEDY, MAX_TOKENS, current_gpu, give_back_steps, take_steps
from gptfast.generation.sampling import SamplingParams
from gptfast.generation.torch_runner import TorchRunner
from gptfast.nn.difference import difference
from gptfast.nn.transformer import Transformer

KERNELS = (
    "embedding",
    "add_layer_norm",
    "layer_norm",
    "causal_attention",
    "sample_rows",
)  # none of them waits for the GPU


class CudaGraphRunner(TorchRunner):
    """`TorchRunner` that replays captured steps. Prompts run uncaptured.

    Args:
        model: one that `supports` accepts.
        max_slots, max_len: see `TorchRunner`.
    """

    def __init__(self, model: Transformer, max_slots: int, max_len: int) -> None:
        self._steps = take_steps(model, max_slots, max_len)
        super().__init__(model, max_slots, max_len, self._steps.cache)
        weakref.finalize(self, give_back_steps, weakref.ref(model), self._steps).atexit = False

    @staticmethod
    def supports(model: Transformer) -> bool:
        """Whether the model's steps can be captured: on a GPU with the CUDA kernels, without banded layers, and with modules
        that are what its config says."""
        weight = model.wte.weight
        if not weight.is_cuda or not _may_capture(weight.device) or difference(model) is not None:
            return False
        banded = any(model.config.window_of(layer) is not None for layer in range(model.config.n_layer))
        return not banded and all(resolve(op, None, weight) == "cuda" for op in KERNELS)

    def _step(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        if not self._can_replay(slots):
            return super()._step(slots, ids)
        rows = self._load(slots, ids=ids)
        self._steps.forward(self._model)
        for slot in slots:
            self._lengths[slot] += 1
        return self._steps.logits_of(rows)

    def _forward(self, slots: list[int], tokens: list[Sequence[int]], last_only: bool = False) -> Tensor:
        self._steps.follow(self._model)
        return super()._forward(slots, tokens, last_only)

    def decode_steps(
        self,
        slots: Sequence[int],
        logits: Tensor,
        max_tokens: int,
        params: Sequence[SamplingParams],
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        with self._lock, torch.inference_mode():
            self._check("decode_steps", slots)
            vocab, *others = {one.vocab for one in params}
            if others or not self._can_replay(slots):
                return super().decode_steps(slots, logits, max_tokens, params, stop_ids)
            rows = self._load(slots, params=params, logits=logits)
            if not self._steps.can_sample(vocab, self._model):
                return super().decode_steps(slots, logits, max_tokens, params, stop_ids)
            room = min(self.max_len - self._lengths[slot] + 1 for slot in slots)
            drawn = self._steps.decode(self._model, min(max_tokens, MAX_TOKENS, room), vocab)
            new = [_until_stop(drawn[row], stop_ids) for row in rows]
            for slot, tokens in zip(slots, new, strict=True):
                self._lengths[slot] += len(tokens) - 1
            return new

    def _can_replay(self, slots: Sequence[int]) -> bool:
        """Whether a captured step may run for these slots. It writes behind the last position of every other slot, too,
        which must not be full."""
        if any(self._prefix_of.get(slot) for slot in self._row_of):  # the steps count positions by tokens
            return False
        idle = self._row_of.keys() - set(slots)
        full = any(self._lengths[slot] >= self._cache.max_len for slot in idle)
        return not full and _may_capture(self._steps.device)

    def _load(
        self,
        slots: Sequence[int],
        ids: Sequence[int] = (),
        params: Sequence[SamplingParams] = (),
        logits: Tensor | None = None,
    ) -> list[int]:
        """Put what a step of the slots reads into the static buffers; returns the rows of the slots."""
        count = len(self._slot_in)
        lengths, last, streams = [self._lengths[slot] for slot in self._slot_in], [0] * count, [0] * count
        options = [GREEDY] * count
        rows = [self._row_of[slot] for slot in slots]
        for row, token in zip(rows, ids, strict=False):
            last[row] = token
        for row, one in zip(rows, params, strict=False):
            streams[row], options[row] = one.stream, ops.row_options(*one[:4])
        self._steps.load([lengths, last, streams], options, rows, logits)
        return rows


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens up to the first stop token or error code."""
    for n, token in enumerate(tokens):
        if token < 0 or token in stop_ids:
            return tokens[: n + 1]
    return tokens


def _may_capture(device: torch.device) -> bool:
    """Not under autocast, whose casts a graph would keep, and not inside a capture of the caller's."""
    if torch.is_autocast_enabled("cuda"):
        return False
    if device.type != "cuda":
        return True
    with current_gpu(device):
        return not torch.cuda.is_current_stream_capturing()
