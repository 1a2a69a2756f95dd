"""GPTs with experts: MXFP4 files, published counts, what is refused, a run that learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptfast import GPT, GPTConfig
from gptfast.checkpoints.mxfp4 import mxfp4_values
from gptfast.finetuning import LoraConfig
from gptfast.models.parameter_table import active_parameters, parameter_table
from gptfast.nn.experts import ExpertMLP
from gptfast.training.config import TrainConfig
from gptfast.training.optim import build_optimizers
from tests.support.mxfp4 import with_mxfp4

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "head_size": 8, "n_inner": 64, "vocab_size": 61}


def tiny(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig.preset("gptoss-tiny", **{**TINY, "block_size": 32, "window": 8, "n_expert": 4, **changes})
    ).eval()


@pytest.mark.parametrize(("name", "total", "active"), [("gpt-oss-20b", 20.91, 3.61), ("gpt-oss-120b", 116.83, 5.13)])
def test_published_counts(name: str, total: float, active: float):
    """In billions, as the model card has them (OpenAI, arXiv 2508.10925, table 1)."""
    config = GPTConfig.preset(name)
    assert round(sum(row.count for row in parameter_table(config)) / 1e9, 2) == total
    assert round(active_parameters(config) / 1e9, 2) == active


def test_counts_are_those_of_the_model():
    for model in (tiny(), tiny(bias=False, tie_weights=False)):
        assert sum(row.count for row in parameter_table(model.config)) == model.num_parameters()
    model = tiny(attention_pattern="L", window=None)
    used = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith("bias"))
    used += sum(p.numel() // 2 for p in model.parameters() if p.dim() == 3)  # 2 of 4 experts; the head is the embedding
    assert model.flops_per_token(1, training=False) == 2 * used + 4 * 2 * 32


def test_mxfp4_is_that_of_transformers(tmp_path: Path):
    """Every code and every exponent that bfloat16 holds, and a checkpoint in it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 2, 8, 16)
    scales = torch.tensor([[1, 2, 64, 126, 127, 128, 200, 253], [127] * 8], dtype=torch.uint8)[None]
    wanted = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(mxfp4_values(blocks, scales).transpose(1, 2), wanted)
    with pytest.raises(ValueError, match="holds 255"):
        mxfp4_values(blocks, torch.full_like(scales, 255))

    base = tiny().bfloat16()
    base.save_pretrained(tmp_path / "base")
    codes, raw = with_mxfp4(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base")
    for n, block in enumerate(model.h):
        name = f"model.layers.{n}.mlp.experts."
        for own in ("gate_up_proj", "down_proj"):
            expected = convert_moe_packed_tensors(codes[f"{name}{own}_blocks"], codes[f"{name}{own}_scales"])
            assert torch.equal(getattr(block.mlp, own), expected)
    model.save_pretrained(tmp_path / "again")  # in bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    again = GPT.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    missing = {name: x for name, x in codes.items() if not name.endswith("layers.1.mlp.experts.down_proj_scales")}
    save_file(missing, tmp_path / "base/model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj_blocks has shape .* beside no scales"):
        GPT.from_pretrained(tmp_path / "base")
    raw["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "base/config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="quant_method 'awq'; gptfast reads float weights, and mxfp4"):
        GPT.from_pretrained(tmp_path / "base")


def test_it_learns():
    """Every expert gets a gradient somewhere, and a text is learnt by heart; biases of experts do not decay."""
    model = tiny().train()
    ids = torch.randint(61, (4, 32), generator=torch.Generator().manual_seed(1))
    optimizers = build_optimizers(model, TrainConfig(learning_rate=1e-2, weight_decay=0.1))
    free = {id(p) for group in optimizers[0].param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all((id(p) in free) == (p.dim() == 1 or name.endswith("_bias")) for name, p in model.named_parameters())
    losses = []
    for _ in range(60):
        loss = model(ids, labels=ids)[1]
        loss.backward()
        losses.append(loss.item())
        optimizers[0].step()
        optimizers[0].zero_grad()
    assert losses[0] > 4 and losses[-1] < 1


def test_cached_and_whole_agree():
    model = tiny()
    prompt = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    texts = model.generate(prompt, max_new_tokens=20)
    with torch.no_grad():
        logits = model(texts)
    assert torch.equal(logits[:, 8:-1].argmax(-1), texts[:, 9:])


def test_refusals(tmp_path: Path):
    for changes, message in (
        ({"n_expert": 2, "n_expert_per_tok": 3}, "n_expert_per_tok is 3 but n_expert is 2"),
        ({"n_expert": 2}, "n_expert is 2 and n_expert_per_tok is None; expected both or none"),
        ({"n_expert": 2, "n_expert_per_tok": 1, "activation": "relu"}, "n_expert is for activation='swiglu'"),
        ({"swiglu_limit": 7.0}, "swiglu_limit is for activation='swiglu'"),
    ):
        with pytest.raises(ValueError, match=message):
            GPTConfig(**{"activation": "gelu"} | ({"activation": "swiglu"} if "n_expert" in changes else {}) | changes)
    with pytest.raises(ValueError, match="ExpertMLP: n_expert is None"):
        ExpertMLP(GPTConfig())
    model = tiny()
    with pytest.raises(ValueError, match=r"mlp\.router \(Router\); low-rank updates"):
        model.add_adapter(LoraConfig(target_modules=["mlp.router"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not pack the experts of a model with n_expert=4"):
        GPT.from_pretrained(tmp_path, quantize="int8")
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_local_experts": 5}))
    with pytest.raises(ValueError, match="num_local_experts is 5"):
        GPT.from_pretrained(tmp_path)
