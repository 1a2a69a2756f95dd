"""The modules against torch's own: results, gradients, state_dict, signatures, and the errors they add."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

import gptfast.nn as gnn
from gptfast import ops
from gptfast.models import GPTConfig


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def same_behaviour(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, *others: torch.Tensor) -> None:
    """Same state_dict, and after loading theirs the same result and gradients."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    grads = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = module(leaf, *others)
        upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        wanted = [leaf, *module.parameters()]
        grads.append([out, *torch.autograd.grad(out, wanted, upstream)])
    for a, b in zip(*grads, strict=True):
        assert a.shape == b.shape
        close(a, b)


@pytest.mark.parametrize("shape", [(20,), 20, (4, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False, "eps": 1e-3}, {"elementwise_affine": False}], ids=str)
def test_layer_norm(shape, options: dict):
    theirs = torch.nn.LayerNorm(shape, **options)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    dims = (20,) if shape == 20 else tuple(shape)
    same_behaviour(gnn.LayerNorm(shape, **options), theirs, torch.randn(3, 7, *dims))


def test_layer_norm_with_a_residual_is_dropout_add_norm():
    norm = gnn.LayerNorm(24)
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    y, total = norm(x, residual, dropout_p=0.5, seed=7, offset=3)
    kept = ops.dropout_mask((1, 10, 24), 0.5, seed=7, offset=3).view(2, 5, 24)
    close(total, residual + 2 * x * kept)
    close(y, F.layer_norm(total, (24,), norm.weight, norm.bias))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str):
    same_behaviour(gnn.GELU(approximate), torch.nn.GELU(approximate), torch.randn(3, 11) * 3)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(activation: str | None, bias: bool):
    ours, theirs = gnn.Linear(9, 14, bias=bias, activation=activation), torch.nn.Linear(9, 14, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 9)
    expected = theirs(x)
    if activation:
        expected = F.gelu(expected, approximate="tanh" if activation == "gelu_tanh" else "none")
    close(ours(x), expected)


@pytest.mark.parametrize("layout", [(6, 13), (6, 13, 4), (2, 13, 3, 2), (13,)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"reduction": "none", "ignore_index": 3}, {"label_smoothing": 0.2, "ignore_index": 0}],
    ids=str,
)
def test_cross_entropy_loss(layout: tuple, options: dict):
    target_shape = layout[:1] + layout[2:] if len(layout) > 1 else ()
    targets = torch.randint(13, target_shape)
    if targets.dim():
        targets.view(-1)[0] = options.get("ignore_index", -100)
    same_behaviour(
        gnn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options), torch.randn(layout) * 3, targets
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_loss(reduction: str):
    head = torch.nn.Linear(8, 30, bias=False)
    ours = gnn.LinearCrossEntropyLoss(8, 30, reduction=reduction, ignore_index=5, label_smoothing=0.1)
    ours.linear.load_state_dict(head.state_dict())
    assert list(ours.state_dict()) == ["linear.weight"]
    x, targets = torch.randn(4, 6, 8, requires_grad=True), torch.randint(30, (4, 6))
    targets[1, 2] = 5
    got = ours(x, targets)
    want = F.cross_entropy(
        head(x).flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=5, label_smoothing=0.1
    )
    close(got.flatten(), want.flatten())
    for a, b in zip(
        torch.autograd.grad(got.sum(), (x, ours.linear.weight)),
        torch.autograd.grad(want.sum(), (x, head.weight)),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gnn.LayerNorm, torch.nn.LayerNorm),
        (gnn.GELU, torch.nn.GELU),
        (gnn.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
        (gnn.Dropout, torch.nn.Dropout),
        (gnn.Linear, torch.nn.Linear),
    ],
)
def test_arguments_are_those_of_torch_in_their_order(ours, theirs):
    got, want = (list(inspect.signature(c.__init__).parameters.values()) for c in (ours, theirs))
    positional = [p for p in got if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in want]


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_uses_the_mask_of_seed_and_call_number():
    module, x = gnn.Dropout(0.25, seed=11), torch.randn(3, 4, 40)
    for call in range(3):
        kept = ops.dropout_mask((1, 12, 40), 0.25, seed=11, offset=call).view(x.shape)
        close(module(x), x * kept / 0.75)
    assert module.counter.offset == 3
    assert not list(module.state_dict())


def test_seed_dropout_decides_whatever_torchs_seed():
    x = torch.ones(1000)
    a, b = gnn.Dropout(0.5), gnn.Dropout(0.5)
    assert not torch.equal(a(x), b(x)), "two modules share a mask"
    model = torch.nn.Sequential(a, torch.nn.Sequential(b))
    runs = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        gnn.seed_dropout(model, 5)
        runs.append((a(x), b(x)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_dropout_off_inplace_and_scalar():
    x = torch.ones(64)
    assert gnn.Dropout(0.5).eval()(x) is x
    assert gnn.Dropout(0.0)(x) is x
    out = gnn.Dropout(0.5, inplace=True)(x)
    assert out is x
    assert set(x.tolist()) == {0.0, 2.0}
    assert gnn.Dropout(1.0)(torch.tensor(3.0)) == 0


# ---- blocks ---------------------------------------------------------------------------------------------------------


def small(**options) -> GPTConfig:
    return GPTConfig(**{"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "dropout": 0.0, **options})


def plain_block(block: gnn.Block, x: torch.Tensor) -> torch.Tensor:
    """The block without fusion, in torch."""

    def norm(module, y):
        return F.layer_norm(y, (24,), module.weight, module.bias, module.eps)

    def attention(y):
        B, T, C = y.shape
        q, k, v = block.attn.c_attn(y).view(B, T, 3, 3, 8).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return block.attn.c_proj(out.transpose(1, 2).reshape(B, T, C))

    if block.pre_norm:
        x = x + attention(norm(block.ln_1, x))
        return x + block.mlp(norm(block.ln_2, x))
    x = norm(block.ln_1, x + attention(x))
    return norm(block.ln_2, x + block.mlp(x))


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("bias", [True, False])
def test_block_alone_and_in_its_fused_form(position: str, bias: bool):
    block = gnn.Block(small(norm_position=position, bias=bias))
    x = torch.randn(2, 9, 24)
    expected = plain_block(block, x)
    close(block(x), expected)
    branch, residual = block(None, x)
    close(residual if branch is None else residual + branch, expected)
    before = torch.randn_like(x)  # a branch that another block handed on
    branch, residual = block(before, x)
    close(residual if branch is None else residual + branch, plain_block(block, x + before))


@pytest.mark.parametrize("position", ["pre", "post"])
def test_block_advances_its_own_dropout(position: str):
    block = gnn.Block(small(norm_position=position, dropout=0.3))
    x = torch.randn(2, 9, 24)
    again = copy.deepcopy(block)
    gnn.seed_dropout(block, 2)
    gnn.seed_dropout(again, 2)
    first, second = block(x), block(x)
    assert not torch.equal(first, second)
    assert torch.equal(again(x), first)
    assert torch.equal(block.eval()(x), again.eval()(x))


def test_banded_attention_sees_its_window_only():
    config = small(attention_pattern="alternating", window=4)
    x = torch.randn(1, 12, 24)
    changed = x.clone()
    changed[:, 0] += 1
    for layer, seen in ((0, 12), (1, 4)):
        attention = gnn.CausalSelfAttention(config, layer)
        differs = (attention(x) - attention(changed)).abs().amax(-1)[0] > 0
        assert differs.tolist() == [t < seen for t in range(12)]


# ---- errors ---------------------------------------------------------------------------------------------------------

X, Y = torch.randn(4, 9), torch.randint(9, (4,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gnn.LayerNorm(8)(X), ValueError, r"LayerNorm: input has shape \(4, 9\); .*\(8,\)"),
        (lambda: gnn.GELU("fast")(X), ValueError, "approximate is 'fast'"),
        (lambda: gnn.Dropout(0.5, seed=-1), ValueError, "Dropout: seed is -1"),
        (lambda: gnn.Linear(9, 3, activation="mish")(X), ValueError, "activation is 'mish'"),
        (lambda: gnn.CrossEntropyLoss(weight=torch.ones(9)), ValueError, "CrossEntropyLoss: weight is .*not support"),
        (lambda: gnn.CrossEntropyLoss()(X, X.softmax(-1)), TypeError, "target has dtype torch.float32; expected class"),
        (lambda: gnn.CrossEntropyLoss()(X, Y[:3]), ValueError, r"input has shape \(4, 9\) and target \(3,\)"),
        (
            lambda: gnn.LinearCrossEntropyLoss(9, 5, bias=True),
            ValueError,
            "bias is True, which the fused loss does not",
        ),
        (lambda: gnn.LinearCrossEntropyLoss(9, 9)(X, Y[:3]), ValueError, r"input has shape \(4, 9\) and target \(3,\)"),
        (lambda: gnn.Block(small())(None), TypeError, "Block: x is None without a residual"),
    ],
)
def test_errors_name_what_is_wrong(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
