"""A plain GPT-2 block is one node of the graph: the bits of its modules, and these themselves where anything is not plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast.models import GPT, GPTConfig

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 31}
NODE = "_BlockNodeBackward"


def model_of(dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, dropout=dropout, **options)).train()
    for parameter in model.parameters():  # biases and norms that say something
        torch.nn.init.normal_(parameter, std=0.3)
    model.dropout_seed = 7
    return model


def batch(rows: int = 2, T: int = 24) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (rows, T), generator=torch.Generator().manual_seed(1))


def nodes(loss: Tensor) -> int:
    """How many blocks of a loss are one node each."""
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return sum(type(node).__name__ == NODE for node in found)


def step(model: Any, ids: Tensor, bf16: bool = False, by_modules: bool = False) -> tuple[Tensor, int]:
    """The loss, and the number of nodes; gradients in the parameters."""
    hooks = [block.ln_2.register_forward_hook(lambda *_: None) for block in model.h] if by_modules else []
    model.zero_grad()
    model.dropout_step = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(ids, ids)[1]
    for hook in hooks:
        hook.remove()
    loss.backward()
    return loss.detach(), nodes(loss)


def gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("rows", "T"), [(2, 24), (1, 5)])  # products by our kernels, and by torch's
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.3},
        {"bias": False, "n_kv_head": 1, "activation": "gelu"},
        {"attn_softcap": 5.0, "attention_pattern": "alternating", "window": 3, "dropout": 0.1},
    ],
)
def test_a_block_has_the_bits_of_its_modules(options: dict[str, Any], rows: int, T: int, bf16: bool) -> None:
    model, ids = model_of(**options), batch(rows, T)
    loss, found = step(model, ids, bf16)
    ours = gradients(model)
    expected, none = step(model, ids, bf16, by_modules=True)
    assert (found, none) == (2, 0)
    assert torch.equal(loss, expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours.pop(name), gradient, rtol=0, atol=0, msg=name)
    assert not ours


def test_frozen_parameters_get_no_gradient() -> None:
    model = model_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("ln_1.weight", "c_fc.weight", "attn.c_proj.bias")))
    step(model, batch())
    ours = gradients(model)
    step(model, batch(), by_modules=True)
    expected = gradients(model)
    assert len(ours) == 6
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


MODULES = ("ln_1", "attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("name", MODULES)
def test_hooks_and_replaced_forwards_inside_a_block_run(name: str) -> None:
    model, ids, seen = model_of(), batch(), []
    part = model.h[1].get_submodule(name)
    for register in (part.register_forward_hook, part.register_forward_pre_hook):
        hook = register(lambda *_: seen.append(name))
        assert step(model, ids)[1] == 1
        hook.remove()
    assert len(seen) == 2
    hook = part.register_full_backward_hook(lambda *_: seen.append(name))
    assert step(model, ids)[1] == 1
    hook.remove()
    original = part.forward
    part.forward = lambda *args, **options: (seen.append(name), original(*args, **options))[1]
    assert step(model, ids)[1] == 1
    assert len(seen) == 4
    del part.forward
    assert step(model, ids)[1] == 2


def test_a_global_hook_sees_every_module() -> None:
    seen: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        assert step(model_of(), batch())[1] == 0
    finally:
        hook.remove()
    assert seen.count("Linear") == 8


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "rms_norm"},
        {"position_embedding": "rotary"},
        {"norm_position": "post"},
        {"parallel_residual": True},
        {"activation": "swiglu"},
        {"attention_sinks": True},
        {"norm_affine": False},
    ],
)
def test_other_models_run_by_modules(options: dict[str, Any]) -> None:
    assert step(model_of(**options), batch())[1] == 0


def test_backends_without_kernels_and_other_calls_run_by_modules() -> None:
    model, ids = model_of(), batch()
    with gptfast.backend("eager"):
        assert step(model, ids)[1] == 0
    assert nodes(model.double()(ids, ids)[1]) == 0
    model = model_of()
    assert nodes(model(ids[:1], ids[:1], cu_seqlens=torch.tensor([0, 9, 24]))[1]) == 0
    with torch.no_grad():
        assert model(ids, ids)[1].grad_fn is None


def test_a_weight_of_another_shape_is_the_error_of_its_op() -> None:
    model = model_of()
    model.h[0].attn.c_attn.weight = torch.nn.Parameter(torch.zeros(48, 15))
    with pytest.raises(ValueError, match="linear: x has shape"):
        step(model, batch())


def test_a_second_derivative_is_the_error_of_the_kernels() -> None:
    model, ids = model_of(), batch()
    loss = model(ids, ids)[1]
    weight = model.h[0].attn.c_attn.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    step(model, ids)
    assert torch.equal(gradient, gradients(model)["h.0.attn.c_attn.weight"])
    with pytest.raises(RuntimeError, match="double backward is not implemented by the fused kernels"):
        gradient.sum().backward()


@pytest.mark.parametrize("T", [5, 24])
def test_a_batch_of_backward_passes(T: int) -> None:
    block = model_of().h[0]
    x = torch.randn(1, T, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    upstream = torch.randn(3, 1, T, 16, generator=torch.Generator().manual_seed(3))

    def grad(upstream: Tensor, many: bool) -> tuple[Tensor, ...]:
        branch, stream = block(x, x, rng=(0, 1))
        wanted = (x, block.mlp.c_fc.weight)
        return torch.autograd.grad(branch + stream, wanted, upstream, is_grads_batched=many)

    for n, each in enumerate(grad(upstream, True)):
        expected = torch.stack([grad(one, False)[n] for one in upstream])
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)
