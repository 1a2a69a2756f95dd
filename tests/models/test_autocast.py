"""GPT under autocast: which norms write the autocast dtype, and that this changes no bit of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptfast.nn as gnn
from gptfast import GPT, GPTConfig
from gptfast.finetuning import LoraConfig
from gptfast.nn import block, transformer

V, T = 61, 24
HALF = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
LLAMA: dict[str, Any] = {
    "position_embedding": "rotary",
    "norm": "rms_norm",
    "activation": "swiglu",
    "bias": False,
    "dropout": 0.1,
}
RUNS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "dropout": {"dropout": 0.1},
    "gpt1": {"norm_position": "post", "final_norm": False},
    "untied, without biases": {"tie_weights": False, "bias": False},
    "llama": LLAMA,
}


def make(**options: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": V, "block_size": T, "dropout": 0.0}
    model = GPT(GPTConfig(**{**shape, **options}))
    model.dropout_seed = 3
    return model


def ids(rows: int = 3) -> Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


def with_adapters(model: GPT) -> GPT:
    model.add_adapter(LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False))
    return model


def trained(model: GPT, dtype: torch.dtype, steps: int = 3, **batch: Any) -> list[Tensor]:
    """Losses and gradients of all steps, and the parameters after the last."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype):
            loss = model(ids(), labels=ids(), **batch)[1]
        optimizer.zero_grad()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)]
        optimizer.step()
    return [*found, *(p.detach() for p in parameters)]


def same_as_through_fp32(run: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = run()
    with monkeypatch.context() as patch:
        for module in (block, transformer):
            patch.setattr(module, "written_for", lambda *_: {})
        before = run()
    assert len(ours) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", RUNS)
def test_training_has_the_bits_of_fp32_between(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A norm that writes float32, which the next product rounds: how every run before had it."""
    same_as_through_fp32(lambda: trained(make(**RUNS[name]), dtype), monkeypatch)


def recomputing() -> list[Tensor]:
    model = make(dropout=0.1)
    model.recompute = True
    return trained(model, torch.bfloat16)


def padded() -> list[Tensor]:
    mask = (torch.arange(T) < torch.tensor([[T], [5], [17]])).long()
    return trained(make(), torch.bfloat16, attention_mask=mask)


def logits() -> list[Tensor]:
    model = make().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return [model(ids()), model(ids(), last_only=True), model(ids()[:, :1])]


@pytest.mark.parametrize(
    "run",
    [recomputing, padded, logits, lambda: trained(with_adapters(make()), torch.bfloat16)],
    ids=["recompute", "padding", "logits", "adapters"],
)
def test_so_have_others(run: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch):
    same_as_through_fp32(run, monkeypatch)


@contextmanager
def written(model: nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """The dtypes that the norms write in the forwards inside."""
    found: dict[str, torch.dtype] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, __, y: found.__setitem__(name, (y[0] if isinstance(y, tuple) else y).dtype)

    hooks = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if "ln_" in name.split(".")[-1]]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("dtype", HALF)
def test_what_only_products_read_is_in_their_dtype(dtype: torch.dtype, options: dict[str, Any]):
    model = make(**options)
    with written(model) as found, torch.autocast("cpu", dtype):
        model(ids(), ids())
    assert found == {f"h.{n}.ln_{k}": dtype for n in range(2) for k in (1, 2)} | {"ln_f": dtype}
    with written(model) as found:
        model(ids(), ids())
    assert set(found.values()) == {torch.float32}


class Scaled(nn.Module):
    """Not a `Linear`: it reads its input as it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 1.1)


class OwnLinear(gnn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input.mean()


class OwnMLP(gnn.MLP):
    def forward(self, x: Tensor, adapters: Any = None) -> Tensor:
        return super().forward(x) + x


def test_what_others_read_stays_as_it_is():
    """Residual sums (post-norm), layers and modules of other classes, the caller of hidden_states, other streams."""
    post = make(norm_position="post")
    with written(post) as found, torch.autocast("cpu", torch.bfloat16):
        post(ids())
        assert {found[f"h.{n}.ln_{k}"] for n in range(2) for k in (1, 2)} == {torch.float32}
    model = make()
    model.h[0].attn.c_attn = Scaled(model.h[0].attn.c_attn)
    model.h[1].mlp.__class__ = OwnMLP
    model.lm_head.__class__ = OwnLinear
    with written(model) as found, torch.autocast("cpu", torch.bfloat16):
        model(ids())
        kept = {name for name, dtype in found.items() if dtype == torch.float32}
        assert kept == {"h.0.ln_1", "h.1.ln_2", "ln_f"}
        assert model.hidden_states(ids()).dtype == torch.float32
    half = make().bfloat16()
    with written(half) as found, torch.autocast("cpu", torch.float16):
        half(ids())
    assert found["h.0.ln_1"] == torch.bfloat16  # rounded twice before: its bits stay too
