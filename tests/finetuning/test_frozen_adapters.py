"""inference_mode of a configuration, and what deleting another adapter leaves trained, as in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast.finetuning import LoraConfig, PromptTuningConfig

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32}
LORA = {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}


def new() -> gptfast.GPT:
    return gptfast.GPT(gptfast.GPTConfig(**SIZES, block_size=32, vocab_size=61, tie_weights=False))


def trained(model: torch.nn.Module) -> set[bool]:
    """Whether the parameters of adapters are trained."""
    kinds = (".lora_A.", ".lora_B.", ".modules_to_save.", "prompt_encoder.")
    return {p.requires_grad for n, p in model.named_parameters() if any(kind in f".{n}" for kind in kinds)}


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode_freezes_as_in_peft(kind: str, inference: bool):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_positions=32, vocab_size=61, bos_token_id=0, eos_token_id=0)
    )
    own: Any = LORA if kind == "lora" else {"num_virtual_tokens": 3}
    config = (peft.LoraConfig if kind == "lora" else peft.PromptTuningConfig)(
        inference_mode=inference, task_type="CAUSAL_LM", **own
    )
    gpt = new()
    gpt.add_adapter(config)
    theirs = peft.get_peft_model(theirs, config)
    assert trained(gpt) == trained(theirs) == {kind == "prompt" or not inference}
    gpt.set_adapter("default"), theirs.set_adapter("default")
    assert trained(gpt) == trained(theirs) == {True}


def test_a_loaded_adapter_is_trained(tmp_path: Path):
    """All files say inference_mode, peft's too; what resumes a run loads them."""
    gpt = new()
    gpt.add_adapter(LoraConfig(inference_mode=True, **LORA))
    gpt.save_adapter(tmp_path / "a")
    gpt = new()
    gpt.load_adapter(tmp_path / "a", any_base=True)
    assert trained(gpt) == {True}
    gpt.set_requires_grad("default", False)
    assert trained(gpt) == {False}


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["c_fc"]), PromptTuningConfig(3)])
def test_what_stays_active_stays_frozen(config: Any):
    gpt = new()
    gpt.add_adapter(LoraConfig(inference_mode=True, **LORA), "frozen")
    gpt.add_adapter(config, "other")
    gpt.set_adapter("frozen")
    gpt.set_requires_grad("frozen", False)
    gpt.delete_adapter("other")
    assert gpt.active_adapters == ["frozen"] and trained(gpt) == {False}
    gpt.add_adapter(config, "other")
    gpt.delete_adapter("other")  # the active one: as in peft, the next is trained
    assert gpt.active_adapters == ["frozen"] and trained(gpt) == {True}
