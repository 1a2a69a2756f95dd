"""Mixtures of experts: parity, transformers' gpt-oss and Mixtral, determinism, the loss that balances, errors."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gptfast import ops
from gptfast.testing import cases, check_case, dtypes
from tests.support.op_properties import check_compiles, check_pure, check_repeatable

CASES = cases("moe")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


def test_properties():
    for dtype in (torch.float32, torch.bfloat16):
        check_repeatable(CASES[2], dtype)
        check_pure(CASES[2], dtype)
    check_compiles(ops.moe, *CASES[1].inputs(torch.float32))


@pytest.mark.parametrize("dtype", dtypes())
def test_without_a_graph(dtype):
    """The same bits by a shorter way, of int32 experts too; and the message for two dtypes."""
    for case in CASES:
        x, experts, *rest = case.inputs(dtype)
        recorded = ops.moe(x, experts, *rest, **case.options)
        with torch.no_grad():
            assert torch.equal(ops.moe(x, experts.int(), *rest, **case.options), recorded)
    x, experts, *rest = CASES[1].inputs(torch.float32)
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match=r"grouped_linear: x is torch.float64 but weight is torch.float32"),
    ):
        ops.moe(x.double(), experts, *rest)


def test_gpt_oss_of_transformers():
    """Router, clamped SwiGLU of interleaved columns, biases, outputs and all gradients."""
    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=8, num_experts_per_tok=4)
    config._experts_implementation = "eager"
    theirs = GptOssMLP(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 25, 32, requires_grad=True)
    wanted = theirs(x)[0]
    wanted.sum().backward()
    expected = {name: p.grad.clone() for name, p in theirs.named_parameters()} | {"x": x.grad.clone()}
    x.grad = None
    theirs.zero_grad()
    rows, router, e = x.flatten(0, 1), theirs.router, theirs.experts
    chosen, weights = ops.route(ops.linear(rows, router.weight, router.bias), 4)
    matrices = e.gate_up_proj.transpose(1, 2), e.down_proj.transpose(1, 2), e.gate_up_proj_bias, e.down_proj_bias
    got = ops.moe(rows, chosen, weights, *matrices, alpha=1.702, limit=7.0, layout="interleaved").view_as(x)
    got.sum().backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)  # measured 1.5e-5 of values up to 80
    for name, grad in ({n: p.grad for n, p in theirs.named_parameters()} | {"x": x.grad}).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def test_balance_is_that_of_transformers():
    logits = [torch.randn(2 * 7, 6, requires_grad=True) for _ in range(3)]
    for mask in (None, torch.tensor([[1] * 7, [1] * 4 + [0] * 3])):
        wanted = load_balancing_loss_func(tuple(logits), 6, 2, mask)
        both = torch.cat(logits)
        got = ops.load_balance_loss(both, ops.route(both, 2)[0], None if mask is None else mask.flatten().repeat(3))
        torch.testing.assert_close(got, wanted)
        for a, b in zip(torch.autograd.grad(got, logits), torch.autograd.grad(wanted, logits), strict=True):
            torch.testing.assert_close(a, b)


def test_balance_of_even_and_of_one():
    even = torch.eye(4).repeat(3, 1) * 1e-4
    assert abs(ops.load_balance_loss(even, ops.route(even, 1)[0]).item() - 1) < 1e-3
    one = torch.tensor([[50.0, 0, 0, 0]]).repeat(5, 1)
    assert abs(ops.load_balance_loss(one, ops.route(one, 1)[0]).item() - 4) < 1e-3


def test_equal_logits_go_to_the_lower_numbers():
    experts, weights = ops.route(torch.tensor([[0.0, 2, 2, 2, 1]]), 3)
    assert experts.tolist() == [[1, 2, 3]] and torch.allclose(weights, torch.full((1, 3), 1 / 3))


def test_a_token_does_not_depend_on_others():
    """Bit for bit: alone, or beside others in any order, with the own products."""
    torch.manual_seed(1)
    x, gate_up, down = torch.randn(64, 40), torch.randn(4, 48, 40), torch.randn(4, 40, 24)
    experts = torch.randint(4, (64, 1)).expand(-1, 2).clone()
    experts[:, 1] = (experts[:, 0] + 1) % 4
    weights = torch.rand(64, 2)
    order = torch.randperm(64)
    whole = ops.moe(x, experts, weights, gate_up, down)
    assert torch.equal(ops.moe(x[order], experts[order], weights[order], gate_up, down), whole[order])


def test_errors():
    x, experts, weights = torch.randn(3, 4), torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.rand(3, 2)
    gate_up, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    good = {"x": x, "experts": experts, "weights": weights, "gate_up": gate_up, "down": down}
    for change, error, message in (
        ({"experts": experts + 1}, ValueError, "experts holds 2; expected numbers from 0 to 1"),
        ({"experts": experts - 1}, ValueError, "experts holds -1"),
        ({"experts": experts.float()}, TypeError, "experts has dtype torch.float32"),
        ({"weights": weights[:, :1]}, ValueError, r"weights \(3, 1\); expected \(N, C\), \(N, k\) and \(N, k\)"),
        ({"gate_up": gate_up[:, :5]}, ValueError, r"gate_up has shape \(2, 5, 4\); expected \(2, 6, 4\)"),
        ({"down": down[:1]}, ValueError, r"down has shape \(1, 4, 3\); expected \(2, 4, 3\)"),
        ({"down_bias": torch.randn(2, 3)}, ValueError, r"down_bias has shape \(2, 3\); expected \(2, 4\)"),
        ({"layout": "columns"}, ValueError, "layout is 'columns'"),
    ):
        with pytest.raises(error, match=message):
            ops.moe(**(good | change))
    with pytest.raises(ValueError, match="k is 3; expected logits"):
        ops.route(torch.randn(4, 2), 3)
    with pytest.raises(ValueError, match="k is 0"):
        ops.route(torch.randn(4, 2), 0)
    with pytest.raises(ValueError, match=r"mask has shape \(2,\)"):
        ops.load_balance_loss(torch.randn(4, 2), torch.zeros(4, 1, dtype=torch.int64), torch.ones(2))
