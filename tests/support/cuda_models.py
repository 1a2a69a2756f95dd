"""A tiny model, and fake CUDA tensors to run it on: they have shapes, dtypes and devices, but no values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gptfast
from gptfast.backend import resolve

CONFIG = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "vocab_size": 61}


def tiny(**options) -> gptfast.GPT:
    torch.manual_seed(0)
    return gptfast.GPT(gptfast.GPTConfig(**{**CONFIG, "dropout": 0.0, **options}))


@pytest.fixture
def on_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[gptfast.GPT]:
    """A model on a GPU that is not there, with the CUDA kernels' shape functions. No gradients: autograd asks the driver."""
    names = resolve.__globals__
    there = replace(names["_backends"]["cuda"], unavailable_reason=lambda index: None)
    monkeypatch.setitem(names["_backends"], "cuda", there)
    monkeypatch.setitem(names, "_ops", {**names["_ops"], "cuda": names["_ops"]["cpu"]})
    model = tiny(dropout=0.1)
    with FakeTensorMode(), torch.no_grad(), gptfast.backend("cuda"):
        for module in model.modules():
            for group in (module._parameters, module._buffers):
                for name, x in group.items():
                    if x is not None:
                        fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                        group[name] = torch.nn.Parameter(fake, requires_grad=False)
        yield model
