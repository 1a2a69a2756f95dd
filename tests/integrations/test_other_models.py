"""Patched models that are not transformers': nanoGPT's and minGPT's kinds of code, and any module tree."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptfast

V, T, C, H = 61, 16, 32, 4


class Norm(nn.Module):
    """LayerNorm with an optional bias, by the function."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal attention by torch's function, as nanoGPT has it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.resid_dropout, self.dropout = nn.Dropout(dropout), dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        p = self.dropout if self.training else 0
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Block(nn.Module):
    def __init__(self, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = Norm(C, True), Attention(dropout), Norm(C, False)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), activation, nn.Linear(4 * C, C), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The shape of nanoGPT's model."""

    def __init__(self, dropout: float = 0.0, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(V, C), nn.Embedding(T, C), nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(dropout, activation()) for _ in range(2))
        self.ln_f, self.lm_head = Norm(C, False), nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1])))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def make(**options: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


IDS = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
TARGETS = IDS.roll(-1, 1).masked_fill(IDS % 7 == 0, -1)


def results(model: GPT) -> list[Tensor]:
    model.zero_grad()
    logits, loss = model(IDS, TARGETS)
    loss.backward()
    return [loss.detach(), logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("activation", [nn.GELU, NewGELU])
def test_a_model_of_nanogpts_kind(activation: type[nn.Module]):
    model = make(activation=activation)
    exact, before = results(copy.deepcopy(model).double()), results(model)
    report = gptfast.accelerate(model)
    told = {name: text for name, text in report.replaced.items() if "." not in name.removeprefix("h.0.")}
    expected = {
        "": "cross_entropy",
        "drop": "dropout",
        "h.0.ln_1": "layer_norm",
        "h.0.attn": "scaled_dot_product_attention",
        "h.0.ln_2": "layer_norm",
        "ln_f": "layer_norm",
        "lm_head": "linear",
    }
    assert told == expected
    assert report.replaced["h.1.mlp.1"] == "gelu"
    for got, own, value in zip(results(model), before, exact, strict=True):
        allowed = 2 * (own - value).abs().max() + 3e-7 * value.abs().max()
        assert (got - value).abs().max() <= allowed
    gptfast.restore(model)
    assert type(model) is GPT and all(torch.equal(a, b) for a, b in zip(results(model), before, strict=True))


def test_copies_and_pickles_of_patched_classes_of_ones_own():
    model = make()
    gptfast.accelerate(model)
    expected = results(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(results(twin), expected, strict=True))
        gptfast.restore(twin)
        assert type(twin) is GPT


def test_dropout_of_attention_follows_manual_seed():
    model = make(dropout=0.3).train()
    gptfast.accelerate(model)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(IDS, TARGETS)[1].item())
    assert losses[0] == losses[1] != losses[2]


def test_torch_itself_is_as_it_was():
    model = make()
    function = F.scaled_dot_product_attention
    gptfast.accelerate(model)
    results(model)
    assert F.scaled_dot_product_attention is function and nn.Linear.forward.__module__ == "torch.nn.modules.linear"
    assert type(nn.LayerNorm(3)) is nn.LayerNorm


@pytest.mark.parametrize("order", ["before", "after"])
def test_torch_compile(order: str):
    model = make()
    expected = results(model)
    if order == "before":
        compiled = torch.compile(model, backend="aot_eager")
        gptfast.accelerate(model)
    else:
        gptfast.accelerate(model)
        compiled = torch.compile(model, backend="aot_eager")
    for got, value in zip(results(compiled), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4)


def test_bfloat16_and_double_go_where_they_can():
    for dtype in (torch.bfloat16, torch.float64):
        model = make().to(dtype)
        if dtype == torch.float64:
            with pytest.raises(ValueError, match="nothing to replace"):
                gptfast.accelerate(nn.Linear(3, 3).to(dtype))
        before = model(IDS)[0]
        gptfast.accelerate(model)
        tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(model(IDS)[0], before, **tolerance)


# ---- attention written out, as minGPT's ------------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    """minGPT's."""

    def __init__(self, dropout: float = 0.0, divisor: float = math.sqrt(C // H)) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))
        self.n_head, self.n_embd, self.divisor = H, C, divisor

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.size()
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(self.n_embd, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / self.divisor)
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))  # type: ignore[index]
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, self.n_embd)))


class MinBlock(nn.Module):
    """A block whose MLP is a function that holds the modules it was made with, as minGPT's: its copies share them."""

    def __init__(self, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), CausalSelfAttention(dropout), nn.LayerNorm(C)
        self.mlp = nn.ModuleList([nn.Linear(C, 4 * C), activation, nn.Linear(4 * C, C)])
        m = self.mlp
        self.mlpf = lambda x: m[2](m[1](m[0](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class MinGPT(GPT):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.h = nn.ModuleList(MinBlock(dropout, NewGELU()) for _ in range(2))


def min_gpt() -> MinGPT:
    torch.manual_seed(0)
    return MinGPT()


def test_a_model_of_mingpts_kind():
    model = min_gpt()
    before = results(model)
    report = gptfast.accelerate(model, verify={"idx": IDS, "targets": TARGETS})
    assert {report.replaced[f"h.{n}.attn"] for n in range(2)} == {"causal_attention"}
    assert report.replaced["h.0.mlp.1"] == "gelu" and report.replaced["h.0.ln_1"] == "layer_norm"
    assert report.errors.keys() == {"loss", "logits", *(name for name, _ in model.named_parameters())}
    assert max(report.errors.values()) < 4, report.errors
    for got, own in zip(results(model), before, strict=True):
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)
    gptfast.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(results(model), before, strict=True))


def test_attention_that_is_written_out_holds_no_scores(monkeypatch: pytest.MonkeyPatch):
    module = nn.Sequential(CausalSelfAttention())
    gptfast.accelerate(module)
    with monkeypatch.context() as without:
        without.setattr(F, "softmax", None)
        module(torch.randn(2, T, C)).sum().backward()
    with pytest.raises(RuntimeError):  # longer than its mask: its own error
        module(torch.randn(2, T + 1, C))


@pytest.mark.parametrize("place", ["attn_dropout", "resid_dropout", "c_attn"])
def test_hooks_of_attention_that_is_written_out_are_called(place: str):
    modules = [CausalSelfAttention().eval() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    gptfast.accelerate(modules[1])
    seen: list[list[Tensor]] = [[], []]
    x = torch.randn(2, T, C)
    for module, kept in zip(modules, seen, strict=True):
        getattr(module, place).register_forward_hook(lambda m, args, out, kept=kept: kept.append(out.detach()))
        module(x)
    assert len(seen[0]) == 1
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("place", ["attn_dropout", "resid_dropout"])
def test_dropout_of_attention_that_is_written_out(place: str):
    module = CausalSelfAttention()
    getattr(module, place).p = 0.5
    gptfast.accelerate(module)
    x = torch.randn(2, T, C)
    torch.manual_seed(3)
    first = module(x)
    assert not torch.equal(first, module(x)) and not torch.equal(first, module.eval()(x))
    torch.manual_seed(3)
    assert torch.equal(first, module.train()(x))


@pytest.mark.parametrize("change", ["another scale", "not causal", "hooks"])
def test_attention_that_computes_something_else_is_left_alone(change: str):
    module = CausalSelfAttention(divisor=2.0) if change == "another scale" else CausalSelfAttention()
    if change == "not causal":
        module.bias.fill_(1)  # type: ignore[operator]
    calls: list[int] = []
    if change == "hooks":
        module.c_attn.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, T, C)
    before = module(x)
    calls.clear()
    report = gptfast.accelerate(module)
    assert ("causal_attention" in report.replaced.values()) == (change == "hooks")
    assert not calls  # looking at a module calls no hooks
    torch.testing.assert_close(module(x), before)


def test_verify_of_a_model_that_returns_no_loss():
    model = min_gpt()
    with pytest.raises(ValueError, match=r"no labels \(it has idx\).*targets for nanoGPT"):
        gptfast.accelerate(model, verify={"idx": IDS})
    layer = nn.Sequential(nn.Linear(4, 4))
    layer.forward = lambda targets: targets * layer[0].weight.sum()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returned a Tensor of the verify batch without a loss"):
        gptfast.accelerate(layer, verify={"targets": torch.ones(3)})
    assert type(layer[0]) is nn.Linear


# ---- weights that are no plain floats --------------------------------------------------------------------------------


class Linear4bit(nn.Linear):
    """As bitsandbytes': a Linear whose weight is a vector of bytes, and whose forward turns them into numbers."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.weight = nn.Parameter(torch.randint(256, (size * size, 1), dtype=torch.uint8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, -1).to(input.dtype) / 256 - 0.5
        return F.linear(input, weight, self.bias)


def test_quantised_layers_are_left_alone_and_listed():
    torch.manual_seed(0)
    model = min_gpt()
    model.h[0].mlp[1] = nn.Sequential(Linear4bit(4 * C), NewGELU())  # type: ignore[index]
    before = model(IDS, TARGETS)[1]
    report = gptfast.accelerate(model, verify={"idx": IDS, "targets": TARGETS})
    assert report.skipped == {"h.0.mlp.1.0": "a Linear4bit, whose forward may differ from Linear's"}
    assert "Linear4bit" in str(report) and report.replaced["h.0.mlp.1.1"] == "gelu"
    assert max(report.errors.values()) < 4
    torch.testing.assert_close(model(IDS, TARGETS)[1], before)


def test_weights_that_stand_for_others_are_left_alone_and_listed():
    """As torchao's, which sit in a plain Linear; or come into one that is patched already."""
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    report = gptfast.accelerate(model)
    assert report.skipped == {"0": "its parameters are TwoTensors"} and "2" in report.replaced
    model[2].weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    model[2].bias = None
    got = model[2](x)
    assert type(got) is TwoTensor and torch.allclose(got.a, x @ torch.ones(4, 4))


def test_a_model_made_from_the_class_of_a_patched_one_is_not_patched():
    model = min_gpt()
    gptfast.accelerate(model)
    other = type(model)(dropout=0.5)
    assert type(other) is MinGPT and other.drop.p == 0.5 and type(other.h[0].attn) is CausalSelfAttention  # type: ignore[union-attr]
    gptfast.accelerate(other)


def test_activations_that_write_into_the_result_of_a_layer():
    """`inplace=True` saves memory in much code; the result must not be a view that refuses it."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 16), nn.SiLU(inplace=True), nn.LayerNorm(16))
    model, x = nn.Sequential(*layers, nn.LeakyReLU(inplace=True)), torch.randn(4, 64, 16)

    def step() -> list[Tensor]:
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = step()
    gptfast.accelerate(model)
    for got, value in zip(step(), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
