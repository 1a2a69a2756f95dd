"""Activations of the MLP: checkpoints both ways with transformers, gradients, and the engine against float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import gptfast
from gptfast.backend import has_cpu_ops
from gptfast.engine import engine_for, load
from gptfast.models import GPT, GPTConfig
from tests.support.engine_models import relative_error

EXACT = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
}
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 97}
GPT2 = ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "gelu", "gelu_python"]
GPT2 += ["relu", "silu", "swish", "quick_gelu", "tanh"]
CHECKPOINTS = [("gpt2", name) for name in GPT2] + [("openai-gpt", name) for name in ("gelu", "relu", "silu", "swish")]
native = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")


@pytest.mark.parametrize(("kind", "name"), CHECKPOINTS, ids=[f"{kind}-{name}" for kind, name in CHECKPOINTS])
def test_checkpoints_both_ways(tmp_path: Path, kind: str, name: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    key = "activation_function" if kind == "gpt2" else "afn"
    config_class = {"gpt2": transformers.GPT2Config, "openai-gpt": transformers.OpenAIGPTConfig}[kind]
    ends = {"bos_token_id": None, "eos_token_id": None}
    theirs = transformers.AutoModelForCausalLM.from_config(config_class(**SIZES, **ends, n_positions=12, **{key: name}))
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that every activation is far from linear
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(97, (2, 12))
    expected = theirs(ids, labels=ids)
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(logits, expected.logits[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss)
    expected.loss.backward()
    loss.backward()
    torch.testing.assert_close(model.wte.weight.grad, theirs.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())[key] == name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_a_changed_activation_is_not_stored_under_the_old_name(tmp_path: Path):
    GPT(GPTConfig(**SIZES, block_size=12, activation="silu")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "activation_function": "swish"}))
    GPT.from_pretrained(tmp_path, activation="relu").save_pretrained(tmp_path)
    assert json.loads(path.read_text())["activation_function"] == "relu"


@native
@pytest.mark.parametrize("activation", EXACT)
def test_logits_of_the_engine(isa: str, activation: str, tmp_path: Path):
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=48, n_inner=75, vocab_size=97, block_size=20, activation=activation)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(97, (2, 20))
    with torch.no_grad(), gptfast.backend("eager"):
        exact = model.double()(ids)
    compiled = engine_for(model.float())
    assert compiled is not None
    assert relative_error(compiled.logits(ids), exact) < 2e-6  # as tests/engine/test_engine.py; measured 6e-7
    assert relative_error(model.compile_for_inference("int8").logits(ids), exact) < 5e-2
    compiled.save(tmp_path / "packed")
    assert torch.equal(load(tmp_path / "packed").logits(ids), compiled.logits(ids))


@native
@pytest.mark.parametrize("activation", EXACT)
def test_values_of_the_engine(isa: str, activation: str):
    """In a model whose logits are activation(c_fc.bias), and nothing else."""
    C = 256
    magnitudes = torch.cat([torch.logspace(-30, -3, 30), torch.linspace(0.001, 1, 50), torch.linspace(1, 110, 48)])
    x = torch.cat([magnitudes, -magnitudes])
    config = GPTConfig(
        n_layer=1, n_head=1, n_embd=C, n_inner=C, vocab_size=C, block_size=1, final_norm=False, tie_weights=False,
        activation=activation,
    )  # fmt: skip
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.get_parameter("h.0.mlp.c_fc.bias").copy_(x)
        for name in ("h.0.mlp.c_proj.weight", "lm_head.weight"):
            model.get_parameter(name).copy_(torch.eye(C))
    got = model.compile_for_inference("float32").logits([0])[0].double()
    exact = EXACT[activation](x.double())
    # GELU's error is absolute, see csrc/cpu/gelu-inl.h; e^x loses with |x|, where x itself is rounded (measured 0.8 of this)
    relative, absolute = (0.0, 2e-7) if activation.startswith("gelu") else (4e-7 + 1.2e-7 * x.abs().double(), 1e-36)
    bound = relative * exact.abs() + absolute * x.abs().clamp(min=1).double()
    assert ((got - exact).abs() <= bound).all(), ((got - exact).abs() / bound).max()
