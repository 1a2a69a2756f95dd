"""attn_implementation="gptfast" in models of transformers, against eager attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast

transformers = pytest.importorskip("transformers")

V, T = 61, 20
COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GATED,
    "Qwen2ForCausalLM": {**GATED, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Qwen3ForCausalLM": {**GATED, "head_dim": 8},
    "MistralForCausalLM": {**GATED, "sliding_window": 6, "num_key_value_heads": 1},
    "GPTNeoXForCausalLM": {**COMMON, "intermediate_size": 48},
    "OPTForCausalLM": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "Gemma2ForCausalLM": {**GATED, "head_dim": 8, "sliding_window": 7, "attn_logit_softcapping": 1.5},
    "GptOssForCausalLM": {
        **GATED,
        "head_dim": 8,
        "sliding_window": 7,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "GPT2LMHeadModel": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def make(name: str, attention: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**FAMILIES[name], **options}, bos_token_id=1, eos_token_id=2)
    model = model_class._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def padding(sides: str) -> tuple[Tensor, Tensor]:
    mask = torch.ones(3, T, dtype=torch.int64)
    if sides in ("left", "both"):
        mask[0, :4] = 0
    if sides in ("right", "both"):
        mask[1, 13:], mask[0, -2:] = 0, 0
    torch.manual_seed(1)
    return torch.randint(3, V, (3, T)), mask


def results(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> list[Tensor]:
    logits = model(ids, attention_mask=mask, use_cache=False, **options).logits[mask.bool()]
    logits.log_softmax(-1).gather(-1, ids[mask.bool()][:, None]).mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("sides", ["none", "left", "right", "both"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_eager_attention(name: str, sides: str):
    ids, mask = padding(sides)
    expected, got = (results(make(name, kind), ids, mask) for kind in ("eager", "gptfast"))
    for want, value in zip(expected, got, strict=True):
        torch.testing.assert_close(value, want, rtol=2e-4, atol=2e-5 * float(want.abs().max() + 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation_with_a_cache_gives_the_same_tokens(name: str):
    ids, mask = padding("left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected, got = (make(name, kind).generate(ids, **options) for kind in ("eager", "gptfast"))
    assert torch.equal(got, expected)


def test_packed_documents_see_themselves_only():
    ids, _ = padding("none")
    places = torch.cat([torch.arange(7), torch.arange(T - 7)])[None].expand(3, -1)
    expected, got = (
        make("LlamaForCausalLM", kind)(ids, position_ids=places, use_cache=False).logits
        for kind in ("eager", "gptfast")
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    alone = make("LlamaForCausalLM", "gptfast")(ids[:, 7:], use_cache=False).logits
    torch.testing.assert_close(got[:, 7:], alone, rtol=1e-4, atol=1e-4)


def test_the_kernel_runs(monkeypatch: pytest.MonkeyPatch):
    """And not torch's attention behind our name."""
    calls = []
    original = gptfast.ops.causal_attention
    monkeypatch.setattr(gptfast.ops, "causal_attention", lambda *a, **k: calls.append(k) or original(*a, **k))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    for sides in ("none", "left", "right", "both"):
        ids, mask = padding(sides)
        make("MistralForCausalLM", "gptfast")(ids, attention_mask=mask, use_cache=False)
    assert len(calls) == 4 * 2, "one call a layer, however many query heads share a key head"
    assert all(call["window"] == 6 for call in calls[2:])


def test_dropout_follows_manual_seed():
    model = make("LlamaForCausalLM", "gptfast", attention_dropout=0.4).train()
    ids, _ = padding("none")
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_soft_caps_and_sinks_run_in_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch):
    """In steps with a cache and padding too, where other models run in torch's attention."""
    calls = []
    original = gptfast.ops.causal_attention
    monkeypatch.setattr(gptfast.ops, "causal_attention", lambda *a, **k: calls.append(k) or original(*a, **k))
    ids, mask = padding("left")
    model = make(name, "gptfast")
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(calls) == 3 * 2
    assert all((call["softcap"] == 1.5) == (call["sinks"] is None) for call in calls)


@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "GptOssForCausalLM"])
def test_soft_caps_and_sinks_under_a_mask_with_holes(name: str):
    """No kernel has such a mask: the scores are written out, as eager attention does."""
    ids, _ = padding("none")
    sees = torch.ones(T, T, dtype=torch.bool).tril()
    sees[5:, 2] = False
    mask = torch.zeros(3, 1, T, T).masked_fill(~sees, torch.finfo(torch.float32).min)
    given = {"full_attention": mask, "sliding_attention": mask}
    expected, got = (
        make(name, kind)(ids, attention_mask=given, use_cache=False).logits for kind in ("eager", "gptfast")
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_changes_of_the_scores_are_refused_by_name():
    from gptfast.integrations.attention import attention_forward

    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(
        NotImplementedError, match=r"position_bias, .* is not supported; use attn_implementation='eager'"
    ):
        attention_forward(torch.nn.Identity(), q, q, q, None, position_bias=torch.ones(2))


@pytest.mark.parametrize("sides", ["none", "left", "right", "both"])
def test_bidirectional_attention_is_that_of_eager(sides: str, monkeypatch: pytest.MonkeyPatch):
    """Logits, pooled output and gradients of BERT, all of it in the kernel."""
    ids, mask = padding(sides)
    found = []
    for kind in ("eager", "gptfast"):
        torch.manual_seed(0)
        config = transformers.BertConfig(**COMMON, intermediate_size=48)
        model = transformers.BertModel._from_config(config, attn_implementation=kind).eval()
        if kind == "gptfast":
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        out = model(ids, attention_mask=mask)
        hidden = out.last_hidden_state[mask.bool()]
        (hidden.sin().sum() + out.pooler_output.square().sum()).backward()
        others = [model(ids[:, :n]).last_hidden_state for n in (1, 9)]
        found.append([hidden, *others, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("queries", [1, 5, T])
def test_cross_attention_is_that_of_eager(queries: int):
    """Fewer, as many and more queries than keys."""
    ids, mask = padding("right")
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in {"layers": 1, "ffn_dim": 48}.items()}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    found = []
    for kind in ("eager", "gptfast"):
        torch.manual_seed(0)
        config = transformers.BartConfig(vocab_size=V, d_model=32, max_position_embeddings=64, **sizes, **heads)
        model = transformers.BartModel._from_config(config, attn_implementation=kind).eval()
        for given in ({"attention_mask": mask, "input_ids": ids}, {"input_ids": ids[:, :5]}):
            found.append(model(**given, decoder_input_ids=ids[:, :queries]).last_hidden_state)
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import gptfast, transformers", "import transformers.modeling_utils, gptfast"])
def test_whichever_package_is_imported_first(order: str):
    code = (
        """
import sys
import gptfast
assert "transformers" not in sys.modules and "torch" not in sys.modules
"""
        if order.startswith("import gptfast")
        else ""
    )
    code += f"""
{order}
config = transformers.LlamaConfig(**{GATED!r})
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="gptfast")
import torch
ids = torch.randint(9, (1, 5))
model.eval()
model2 = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
model2.load_state_dict(model.state_dict())
torch.testing.assert_close(model(ids).logits, model2(ids).logits, rtol=1e-4, atol=1e-4)
import transformers.modeling_utils as m
assert m.__spec__.loader.__class__.__name__ == "SourceFileLoader", m.__spec__
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
