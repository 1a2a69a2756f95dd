"""gptfast finetune --method qlora: where its adapter goes, what the model is held in, and --recompute."""

from __future__ import annotations

import pytest
import torch

from gptfast import GPT
from gptfast.finetuning import LoraConfig, TaskModel
from gptfast.finetuning.networks import stored_network
from gptfast.finetuning.options import MethodOptions, TaskOptions
from gptfast.nn.quantized import QuantizedLinear
from gptfast.training.checkpoint import read_checkpoint
from tests.finetuning.models import gpt
from tests.support.finetuning import base, result
from tests.support.finetuning import finetune as run
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture

TEXTS = ["the cat sat on the mat", "king crown war sword", "the dog sat"]
PACKED = {"quantize": "nf4", "double_quant": True}


def test_the_adapter_goes_on_the_whole_base_and_on_the_packed_one(tmp_path):
    """It is merged into weights of 16 bits, and the drift is told; the packed base refuses."""
    base(tmp_path / "base", n_embd=64)
    assert run(tmp_path, "--method", "qlora") == 0
    best = tmp_path / "out" / "best"
    packed, plain = TaskModel.from_pretrained(best, **PACKED), TaskModel.from_pretrained(best, dtype=torch.bfloat16)
    assert isinstance(packed.gpt.h[0].mlp.c_fc, QuantizedLinear)
    assert not isinstance(plain.gpt.h[0].mlp.c_fc, QuantizedLinear)
    for a, b in zip(packed.predict(TEXTS), plain.predict(TEXTS), strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=0.1)
    with pytest.raises(ValueError, match=r"merge_adapter: h\.0\.attn\.c_attn is held in nf4"):
        packed.gpt.merge_adapter()
    before = plain.predict(TEXTS)
    with pytest.warns(match=r"trained on a base in nf4.*off by \d+\.\d\d% of their norm; the adapter changed"):
        plain.gpt.merge_adapter()
    plain.save_pretrained(tmp_path / "merged")
    merged = TaskModel.from_pretrained(tmp_path / "merged")
    assert merged.gpt.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    for a, b in zip(before, merged.predict(TEXTS), strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=0.02)


def test_what_the_base_is_held_in(tmp_path, capsys):
    """nf4 with double quantisation by default; a width that nf4 does not take is an error that says what does."""
    base(tmp_path / "base", n_embd=64)
    assert run(tmp_path, "--method", "qlora", "--max-steps", "2") == 0
    said = capsys.readouterr().out
    assert "the base in nf4 with double quantisation" in said
    assert "model    " in said
    assert f"{GPT.from_pretrained(tmp_path / 'base').num_parameters() / 1e6:.1f}" in said  # not the codes' number
    checkpoint = read_checkpoint(tmp_path / "out" / "last")
    options = checkpoint.source["finetune"]
    task, method = (cls(**{k: options[k] for k in cls.__dataclass_fields__}) for cls in (TaskOptions, MethodOptions))
    network, _ = stored_network(tmp_path / "out" / "best", task, method, checkpoint.source["base"])
    assert network.gpt.h[0].mlp.c_fc.scales.dtype == torch.uint8
    base(tmp_path / "narrow")
    assert run(tmp_path, "--method", "qlora", "--model", tmp_path / "narrow", out="none") == 1
    assert "has 16 inputs; nf4 takes multiples of 64 - say --quantize int4, int8 or mxfp4" in capsys.readouterr().err
    assert run(tmp_path, "--method", "qlora", "--model", tmp_path / "narrow", "--quantize", "int4", out="int4") == 0
    assert result(tmp_path, "int4")["method"] == "qlora"


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_soft_prompt_beside_a_base_in_few_bits(tmp_path, capsys, format):
    """It is trained beside the codes, and goes on the base in any form."""
    base(tmp_path / "base", n_embd=64)
    assert run(tmp_path, "--method", "prompt", "--quantize", format, "--num-virtual-tokens", "4", task="lm") == 0
    assert f"the base in {format}{' with double quantisation' * (format == 'nf4')}" in capsys.readouterr().out
    source = read_checkpoint(tmp_path / "out" / "last").source
    assert run(tmp_path, "--method", "prompt", "--num-virtual-tokens", "4", task="lm", out="plain") == 0
    of = [result(tmp_path, out)["value"] for out in ("out", "plain")]
    assert of[0] != of[1] and of[0] == pytest.approx(of[1], rel=0.05)
    assert source["base"] != read_checkpoint(tmp_path / "plain" / "last").source["base"]
    assert gptfast("finetune", "--resume", "--out", tmp_path / "out", "--max-steps", "10") == 0
    for options in ({}, {"quantize": format}):
        model = GPT.from_pretrained(tmp_path / "base", **options)
        model.load_adapter(tmp_path / "out" / "best")
        assert len(model.generate([[1, 2]], 3)[0]) == 5


def test_another_base_is_told_by_its_codes(tmp_path, capsys):
    """Only a matrix that is held in codes differs."""
    base(tmp_path / "base", n_embd=64)
    assert run(tmp_path, "--method", "qlora", "--max-steps", "2") == 0
    model = GPT.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight[3, 5] += 0.5
    model.save_pretrained(tmp_path / "base")
    assert gptfast("finetune", "--resume", "--out", tmp_path / "out", "--max-steps", "4") == 1
    assert "is another model than the one that" in capsys.readouterr().err


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("adapter", [False, True])
def test_recompute_gives_the_same_bits_from_less(norm, adapter):
    """Under every dropout; what is kept for the backward pass is a fraction."""
    kept: list[int] = []
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = gpt(50, n_layer=4, dropout=0.1, norm_position=norm, final_norm=norm == "pre").train()
        if adapter:
            model.add_adapter(LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False))
            model.train()
        model.recompute, model.dropout_seed = recompute, 3
        ids = torch.randint(0, 50, (2, 32), generator=torch.Generator().manual_seed(1))
        saved: dict[int, int] = {}

        def keep(x: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            _, loss = model(ids, ids)
        kept.append(sum(saved.values()))
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert torch.equal(grad, grads[1][name]), name
    assert kept[1] < 0.6 * kept[0], kept
