"""Values of a model that no process has whole: those that it would have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptfast.config import GPTConfig
from gptfast.models import GPT
from gptfast.training.values import initial, stored
from tests.support.training import SHAPE

EXPERTS = GPTConfig.preset(
    "gptoss-tiny", n_layer=2, n_embd=16, n_head=2, n_kv_head=1, head_size=8, n_inner=16, vocab_size=31, n_expert=3
)
SHAPES = {
    "tied": SHAPE,
    "untied, no biases": SHAPE.replace(tie_weights=False, bias=False),
    "GPT-1": SHAPE.replace(norm_position="post", final_norm=False),
    "experts": EXPERTS,
    "sinusoids": SHAPE.replace(position_embedding="sinusoidal"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_values_drawn_one_by_one_are_those_of_a_new_model(name: str):
    torch.manual_seed(3)
    expected = GPT(SHAPES[name])
    model, draw = initial(SHAPES[name], 3)
    assert all(p.is_meta for p in model.parameters())
    for key, p in expected.named_parameters():
        assert draw(key).equal(p), key


@pytest.mark.parametrize("name", SHAPES)
def test_values_read_one_by_one_are_those_of_the_checkpoint(tmp_path: Path, name: str):
    torch.manual_seed(3)
    model = GPT(SHAPES[name])
    for p in model.parameters():
        torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    empty, read = stored(tmp_path, block_size=8, dropout=0.0)
    assert empty.config.block_size == 8
    for key, p in GPT.from_pretrained(tmp_path, block_size=8, dropout=0.0).named_parameters():
        assert read(key).equal(p), key


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path):
    GPT(SHAPE).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.ln_f.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    read = stored(tmp_path)[1]
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight has shape \(3,\); expected \(16,\)"):
        read("ln_f.weight")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight is missing"):
        stored(tmp_path)
