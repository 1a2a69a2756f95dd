"""A decoding step of a block in five kernels: what its modules give, and the modules themselves where anything is not plain."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gptfast
from gptfast.finetuning import LoraConfig
from gptfast.models import GPT, GPTConfig
from gptfast.nn.kv_cache import KVCache

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 64}
LLAMA = {"norm": "rms_norm", "position_embedding": "rotary", "activation": "swiglu", "n_kv_head": 2, "bias": False}
PRODUCTS = ("linear", "addmm", "mm", "linear_fwd")


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def model_of(dtype: torch.dtype = torch.bfloat16, **options: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, **options)).eval()
    for parameter in model.parameters():  # biases and norms that say something
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def decode(model: GPT, rows: int = 3) -> tuple[Tensor, Counter[str]]:
    """Logits of one new token of each row, behind four; the operators of that step."""
    ids = torch.randint(SIZES["vocab_size"], (rows, 5), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, rows, dtype=model.wte.weight.dtype)
    with gptfast.backend("emu"), torch.no_grad():
        model(ids[:, :4], cache=cache)
        with Calls() as calls:
            logits = model(ids[:, 4:], cache=cache)
    return logits.float(), calls.found


def by_modules(model: GPT) -> None:
    for block in model.h:
        block.ln_2.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu_squared", "bias": False, "attn_softcap": 5.0},
        LLAMA,
        LLAMA | {"qk_norm": True, "attention_sinks": True},
    ],
    ids=["gpt2", "squared", "llama", "sinks"],
)
def test_a_step_is_five_kernels_a_block(options, emu):
    model = model_of(**options)
    y, found = decode(model)
    by_modules(model)
    expected, modules = decode(model)
    assert found["linear_few"] == 4 * SIZES["n_layer"] and modules["linear_few"] == 0
    assert sum(found[name] for name in PRODUCTS) == 1, "the head alone"
    norms = ("layer_norm_fwd", "add_layer_norm_fwd", "gelu_fwd", "add_rms_norm_fwd")
    assert sum(found[name] for name in norms) == (0 if options.get("norm") else 1), "the last norm alone"
    # bfloat16 rounds at other places: 4 of 2^-8 units of logits of up to 2 measured
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_row_has_the_same_bits_in_any_batch(emu):
    model = model_of()
    single = [decode(model, rows)[0][0] for rows in (1, 2, 8)]
    assert torch.equal(single[0], single[1]) and torch.equal(single[0], single[2])


def hook(model: GPT) -> None:
    model.h[0].attn.register_forward_hook(lambda *_: None)


def own_forward(model: GPT) -> None:
    model.h[0].mlp.forward = model.h[0].mlp.forward


def adapt(model: GPT) -> None:
    model.add_adapter(LoraConfig(r=2))


def transpose(model: GPT) -> None:
    weight = model.h[0].mlp.c_fc.weight
    weight.data = weight.data.t().contiguous().t()


class Sharded(Tensor):
    """As a weight that is spread over ranks: kernels cannot read it."""


def shard(model: GPT) -> None:
    weight = model.h[0].mlp.c_fc.weight.detach().as_subclass(Sharded)
    model.h[0].mlp.c_fc.weight = torch.nn.Parameter(weight, requires_grad=False)


def widen_a_norm(model: GPT) -> None:
    model.h[0].ln_1.float()


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        (lambda model: model.float(), 0),
        (hook, 1),
        (own_forward, 1),
        (adapt, 0),
        (transpose, 1),
        (shard, 1),
        (widen_a_norm, 1),
        (lambda model: model.h[0].train(), 1),
    ],
    ids=["fp32", "hook", "own forward", "adapter", "transposed", "subclass", "mixed", "training"],
)
def test_what_is_not_plain_runs_by_its_modules(change, blocks, emu):
    """blocks: how many of the two are still five kernels."""
    model = model_of()
    change(model)
    assert decode(model)[1]["linear_few"] == 4 * blocks


def test_more_rows_than_a_kernel_takes(emu):
    assert decode(model_of(), rows=9)[1]["linear_few"] == 0
