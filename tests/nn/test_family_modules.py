"""RMSNorm, blocks and networks beyond GPT-3's: against torch, against themselves, under adapters and in 8 bits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gptfast.checkpoints.adapter_config import LoraConfig
from gptfast.evaluation.inside import look_inside
from gptfast.models import GPT, GPTConfig
from gptfast.nn import Block, RMSNorm
from gptfast.nn.kv_cache import KVCache

LLAMA = {"norm": "rms_norm", "position_embedding": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2}
NEOX = {"parallel_residual": True, "position_embedding": "rotary", "partial_rotary_factor": 0.5, "activation": "gelu"}
NANOCHAT = {
    **{"norm": "rms_norm", "norm_affine": False, "qk_norm": True, "embedding_norm": True, "activation": "relu_squared"},
    **{
        "position_embedding": "rotary",
        "rotary_layout": "reversed",
        "logit_softcap": 15.0,
        "tie_weights": False,
        "bias": False,
    },
}
OTHERS = {"attention_sinks": True, "attn_softcap": 5.0, "attention_pattern": "SL", "window": 4, "head_size": 12}
KINDS = {"llama": LLAMA, "neox": NEOX, "nanochat": NANOCHAT, "sinks": LLAMA | OTHERS}
V = 61
IDS = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(1))


def config_of(kind: str, **options) -> GPTConfig:
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": V, "dropout": 0.0}
    return GPTConfig(**{**sizes, **KINDS[kind], **options})


def make(kind: str, **options) -> GPT:
    torch.manual_seed(0)
    model = GPT(config_of(kind, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_is_that_of_torch(affine: bool, eps: float | None):
    x = torch.randn(3, 5, 24)
    theirs = torch.nn.RMSNorm(24, eps, affine)
    ours = RMSNorm(24, eps, affine)
    if affine:
        torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    y, total = ours(x, x)
    torch.testing.assert_close((y, total), (theirs(x + x), x + x))
    with pytest.raises(ValueError, match=r"RMSNorm: input has shape \(3, 5, 23\)"):
        ours(x[..., :23])


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_alone_and_fused_with_the_next(kind: str):
    one, two = (Block(config_of(kind), layer).eval() for layer in (0, 1))
    x = torch.randn(2, 12, 32)
    branch, residual = one(None, x)
    branch, residual = two(branch, residual)
    torch.testing.assert_close(branch + residual, two(one(x)), rtol=1e-5, atol=1e-5)
    if kind == "neox":
        torch.testing.assert_close(one(x), x + one.attn(one.ln_1(x)) + one.mlp(one.ln_2(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_a_function_of_seed_and_step_and_blocks_can_be_computed_again(kind: str):
    gradients = []
    for recompute in (False, True):
        model = make(kind, dropout=0.2).train()
        model.dropout_seed, model.dropout_step, model.recompute = 3, 7, recompute
        model(IDS, IDS)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(float(g.abs().max()) > 0 for g in gradients[0])


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_updates_and_trained_copies_merge(kind: str):
    model = make(kind)
    plain = model(IDS)
    model.add_adapter(
        LoraConfig(r=3, target_modules="all-linear", modules_to_save=["ln_f"] if kind != "nanochat" else None)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    adapted = model(IDS)
    assert float((adapted - plain).abs().max()) > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), adapted, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_llama_is_saved_and_loaded(tmp_path: Path):
    model, again = make("llama"), make("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["c_attn", "mlp.c_fc"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    model.save_adapter(tmp_path)
    again.load_adapter(tmp_path)
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_matrices_in_few_bits(format: str, tmp_path: Path):
    model = make("llama")
    model.save_pretrained(tmp_path)
    small = GPT.from_pretrained(tmp_path, quantize=format)
    assert small.h[0].mlp.c_fc.codes.dtype in (torch.int8, torch.uint8)
    error = (small(IDS) - model(IDS)).abs().mean() / model(IDS).abs().mean()
    assert error < (0.03 if format == "int8" else 0.3)  # measured: 0.006 and 0.1


@pytest.mark.parametrize("kind", [*KINDS, "experts"])
def test_a_cache_gives_the_logits_that_there_are_without(kind: str):
    """Windows, sinks, soft caps and shared heads reach the cached attention: of all rows together, in pieces, and of rows of
    different lengths."""
    experts = {"n_expert": 4, "n_expert_per_tok": 2, "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    model = make("sinks", **experts) if kind == "experts" else make(kind)
    ids = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(2))
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        wanted, cache = model(ids), KVCache(model.config, 3)
        ends = (0, 9, 10, 11, 18, 24)
        parts = [model(ids[:, first:last], cache=cache) for first, last in pairwise(ends)]
        torch.testing.assert_close(torch.cat(parts, 1), wanted, **close)
        cache.lengths = torch.tensor([15, 6, 11])
        for T in (1, 3, 1):
            starts = cache.lengths.tolist()
            got = model(torch.stack([row[n : n + T] for row, n in zip(ids, starts, strict=True)]), cache=cache)
            for row, n, logits in zip(wanted, starts, got, strict=True):
                torch.testing.assert_close(logits, row[n : n + T], **close)


@pytest.mark.parametrize("kind", ["llama", "nanochat", "neox"])
def test_attention_weights_are_those_of_transformers(kind: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = make(kind)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = torch.cat(theirs(IDS[:1], output_attentions=True).attentions)
    found = torch.from_numpy(look_inside(model, IDS[0].tolist()).attention)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_under_autocast_and_in_bf16_rotary_tables_stay_exact():
    model = make("llama")
    half = make("llama").to(torch.bfloat16)
    assert half.rotary.cos.dtype == torch.float32
    assert torch.equal(half.rotary.cos, model.rotary.cos)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(IDS)
    torch.testing.assert_close(half(IDS).float(), model(IDS), rtol=0.05, atol=0.1)
    torch.testing.assert_close(near.float(), model(IDS), rtol=0.05, atol=0.1)


def test_a_soft_cap_of_logits_keeps_float64():
    model = make("nanochat").double()
    logits, cap = model(IDS), model.config.logit_softcap
    raw = model.hidden_states(IDS) @ model.lm_head.weight.T
    torch.testing.assert_close(logits, cap * torch.tanh(raw / cap), rtol=1e-12, atol=1e-12)  # 1e-7 of a cap in float32
