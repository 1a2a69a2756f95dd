"""CompiledGPT.dequantized: the weights that the engine computes with, in torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast.backend import has_cpu_ops
from gptfast.engine import FORMATS, load
from gptfast.evaluation import perplexity
from gptfast.finetuning import LoraConfig
from gptfast.tokenizer import get_tokenizer
from tests.support.engine_models import CONFIGS, expected, ids_of, model_of, relative_error

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")

# Relative error of the logits from the rounding of activations, and the largest measured on these models and instruction sets.
BYTES = 2e-2  # 1.3e-2 in each format of bytes
ACTIVATIONS = {
    "float32": 2e-6,
    "bfloat16": 7e-3,
    **dict.fromkeys(("int8", "int6", "int4", "nf4", "q4", "mxfp4"), BYTES),
}  # 8.3e-7, 3.7e-3
WEIGHTS = {"bfloat16": 4e-3, "int8": 8e-3, "int6": 3e-2, "mxfp4": 0.14}  # relative error of a matrix; else of 4 bits


def exact_logits(model: gptfast.GPT, ids: Tensor) -> Tensor:
    wide = copy.deepcopy(model).double()
    with torch.no_grad(), gptfast.backend("eager"):
        return wide(ids)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "one"])
def test_logits_are_those_of_its_weights(name: str, isa: str):
    """Within the rounding of activations; tied heads and heads of their own. Weights of 4 bits alone are off by far more."""
    model, ids = model_of(name), ids_of(name)
    for dtype in FORMATS:
        compiled = model.compile_for_inference(dtype, cache_dtype="float32")
        own, logits = compiled.dequantized(), compiled.logits(ids)
        assert isinstance(own, gptfast.GPT) and own.config == compiled.config and not own.training
        assert {p.dtype for p in own.parameters()} == {torch.float32}
        assert (own.lm_head.weight is own.wte.weight) == model.config.tie_weights
        found = relative_error(logits, exact_logits(own, ids))
        assert found <= ACTIVATIONS[dtype], f"{dtype}: {found:.2e}"
        if dtype in ("int4", "nf4", "q4"):
            assert found < relative_error(logits, expected(name)) / 5  # 9 and more


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_rounded_as_the_format_says(name: str):
    model = model_of(name)
    weights = {key: value.detach() for key, value in model.named_parameters()}
    for dtype in FORMATS:
        for key, own in model.compile_for_inference(dtype).dequantized().state_dict().items():
            if key not in weights:
                continue
            weight = weights[key]
            matrix = own.dim() > 1 and key != "wpe.weight" and not key.endswith(("proj_bias", "router.weight"))
            if not matrix or dtype == "float32":
                assert torch.equal(own, weight), key
            elif dtype == "bfloat16":  # the smallest of a panel have no exponent of their own
                assert float((own - weight.bfloat16().float()).abs().max()) <= 2**-13 * float(weight.abs().max())
            else:
                head = "wte" in key or "lm_head" in key
                stored = {"q4": "int6", "int4": "int8", "nf4": "int8"}.get(dtype, dtype) if head else dtype
                stored = "bfloat16" if dtype == "mxfp4" and (head or ".attn." in key) else stored
                assert float((own - weight).norm() / weight.norm()) < WEIGHTS.get(stored, 0.12), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packing_them_again_gives_the_same_bits(dtype: str):
    """These formats round a rounded weight to itself."""
    for name in ("odd", "gpt3"):
        compiled = model_of(name).compile_for_inference(dtype)
        again = compiled.dequantized().compile_for_inference(dtype)
        assert torch.equal(again.logits(ids_of(name)), compiled.logits(ids_of(name)))


def test_scales_beyond_fp16():
    """A matrix that is stored divided by a power of two comes back multiplied."""
    model = copy.deepcopy(model_of("gpt3"))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e9)
        model.h[0].mlp.c_fc.weight.mul_(1e-9)
    own = model.compile_for_inference("int8").dequantized()
    for weight, exact in (
        (own.lm_head.weight, model.lm_head.weight),
        (own.h[0].mlp.c_fc.weight, model.h[0].mlp.c_fc.weight),
    ):
        assert relative_error(weight.detach(), exact.detach()) < 2**-7


def test_a_packed_file_and_threads(tmp_path: Path):
    compiled = model_of("odd").compile_for_inference("q4", threads=1)
    compiled.save(tmp_path / "odd.gptfast")
    state = compiled.dequantized().state_dict()
    for other in (load(tmp_path / "odd.gptfast", threads=3), compiled.with_threads(2)):
        assert all(torch.equal(value, state[key]) for key, value in other.dequantized().state_dict().items())


def test_nothing_around_it_matters():
    """torch's defaults and its generator: what the weights begin with is overwritten, and draws nothing."""
    compiled = model_of("odd").compile_for_inference("int8")
    state, seed = compiled.dequantized().state_dict(), torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        other = compiled.dequantized()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in other.state_dict().items()
    )
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_perplexity_of_a_format_is_checked_by_torch():
    tokenizer = get_tokenizer("char", "".join(chr(97 + n) for n in range(26)) + " .,;:!?")
    torch.manual_seed(4)
    model = gptfast.GPT(gptfast.GPTConfig(**{**CONFIGS["odd"], "vocab_size": tokenizer.vocab_size}, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    text = "the quick brown fox jumps over the lazy dog. " * 9
    for dtype, tolerance in (("int8", 1e-2), ("q4", 1e-2)):
        compiled = model.compile_for_inference(dtype)
        loss = [perplexity(one, text, tokenizer)["bits_per_byte"] for one in (compiled, compiled.dequantized())]
        assert abs(loss[0] - loss[1]) < tolerance * loss[1], loss


def test_adapters_are_refused():
    model = copy.deepcopy(model_of("gpt2"))
    base = model.compile_for_inference("int8").dequantized()
    model.add_adapter(LoraConfig(r=2), "tuned")
    compiled = model.compile_for_inference("int8")
    with pytest.raises(ValueError, match=r"dequantized: the model has the adapter 'tuned', .*delete_adapter"):
        compiled.dequantized()
    compiled.delete_adapter("tuned")
    own = compiled.dequantized()
    assert all(torch.equal(value, own.state_dict()[key]) for key, value in base.state_dict().items())
