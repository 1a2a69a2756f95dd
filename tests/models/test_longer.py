"""A longer context for a trained model: beside transformers, in training and fine-tuning, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast._rope import RopeScaling
from gptfast.models.longer import stretched
from gptfast.training.values import stored
from tests.support.finetuning import base
from tests.support.finetuning import finetune as run_finetune
from tests.support.train_command import _argv, _threads, gptfast  # noqa: F401  fixtures

V = 61
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": V, "dropout": 0.0}
LLAMA = {"norm": "rms_norm", "position_embedding": "rotary", "activation": "swiglu", "bias": False, "n_kv_head": 2}
SHAPES = {
    "gpt2": GPTConfig(**SIZES),
    "llama": GPTConfig(**SIZES, **LLAMA),
    "gpt-oss": GPTConfig.preset(
        "gptoss-tiny", **{**SIZES, "n_inner": 32, "n_kv_head": 2, "head_size": 8, "n_expert": 4, "window": 8}
    ),
}


def saved(name: str, folder: Path) -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPES[name]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("gpt2", None),
        ("llama", None),
        ("llama", "linear"),
        ("llama", {"rope_type": "yarn", "beta_fast": 16.0}),
        ("gpt-oss", "yarn"),
    ],
)
def test_transformers_reads_the_longer_model(name: str, scaling: Any, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    saved(name, tmp_path / "short")
    told = {} if scaling is None else {"rope_scaling": scaling}
    model = GPT.from_pretrained(tmp_path / "short", extend_context=96, **told)
    model.save_pretrained(tmp_path / "long")
    raw = json.loads((tmp_path / "long/config.json").read_text())
    if name == "gpt2":
        assert raw["n_positions"] == 96
    else:
        rope, kind = raw["rope_parameters"], scaling if isinstance(scaling, str) else "yarn"
        assert (raw["max_position_embeddings"], rope["rope_type"], rope["factor"]) == (96, kind, 4.0)
        assert rope.get("original_max_position_embeddings") == (24 if kind == "yarn" else None)
        assert rope.get("beta_fast") == (16.0 if isinstance(scaling, dict) else None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "long", attn_implementation="eager").eval()
    ids = torch.randint(V, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    empty, read = stored(tmp_path / "short", extend_context=96, **told)  # as the ranks of fsdp read it
    assert empty.config == model.config
    for key, p in model.named_parameters():
        assert read(key).equal(p), key


def test_learned_positions_are_interpolated(tmp_path: Path):
    short = saved("gpt2", tmp_path)
    table = GPT.from_pretrained(tmp_path, extend_context=70).wpe.weight  # 69 steps of a third of a position
    assert torch.equal(table[::3], short.wpe.weight)
    torch.testing.assert_close(table[1], (2 * short.wpe.weight[0] + short.wpe.weight[1]) / 3)
    assert torch.equal(stretched(short.wpe.weight[:1], 3), short.wpe.weight[:1].expand(3, -1))


def test_a_longer_model_is_extended_from_its_first_context(tmp_path: Path):
    for kind, first in (("yarn", 24), ("linear", None)):
        saved("llama", tmp_path)
        GPT.from_pretrained(tmp_path, extend_context=48, rope_scaling=kind).save_pretrained(tmp_path)
        again = GPT.from_pretrained(tmp_path, extend_context=240).config
        assert again.rope_scaling == RopeScaling(kind, 10.0, first)


def test_what_cannot_be_extended_is_refused(tmp_path: Path):
    saved("gpt2", tmp_path / "gpt2")
    saved("llama", tmp_path / "llama")
    GPT.from_pretrained(tmp_path / "llama", extend_context=48).save_pretrained(tmp_path / "yarn")
    GPT(GPTConfig(**SIZES, position_embedding="sinusoidal")).save_pretrained(tmp_path / "waves")
    for name, given, text in (
        (
            "gpt2",
            {"extend_context": 24},
            "extend_context is 24, but the model has a context of 24; expected a longer one",
        ),
        ("gpt2", {"extend_context": 48, "rope_scaling": "yarn"}, "the model has learned positions, not rotary ones"),
        ("gpt2", {"extend_context": 48, "block_size": 30}, "extend_context is 48 and block_size 30"),
        ("waves", {"extend_context": 48}, "sinusoidal positions, which are computed for any length"),
        (
            "llama",
            {"extend_context": 48, "rope_scaling": "llama3"},
            "rope_scaling is 'llama3'; expected yarn or linear",
        ),
        ("yarn", {"extend_context": 96, "rope_scaling": "linear"}, "'linear', and the model has yarn"),
        ("llama", {"extend_context": 48, "rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor is 0.5"),
    ):
        with pytest.raises(ValueError, match=text):
            GPT.from_pretrained(tmp_path / name, **given)
    with pytest.raises(TypeError, match=r"extend_context: tokens is 1\.5; expected an int"):
        GPT.from_pretrained(tmp_path / "gpt2", extend_context=1.5)


@pytest.mark.slow
def test_a_checkpoint_is_trained_on_at_a_longer_context(tmp_path: Path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("she sells sea shells by the sea shore and the shells she sells are sea shells.\n" * 40)
    quick = ("--max-steps", "2", "--batch-size", "2", "--eval-batches", "1", "--dtype", "float32")
    shape = ("--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16")
    assert gptfast("train", "--data", text, *shape, *quick, "--out", tmp_path / "a") == 0
    start = ("train", "--data", text, "--init-from", tmp_path / "a/best")
    assert gptfast(*start, "--extend-context", 48, *quick, "--out", tmp_path / "b") == 0
    said = capsys.readouterr().out
    assert "its context of 16 tokens is extended to 48: learned positions are interpolated" in said
    assert GPT.from_pretrained(tmp_path / "b/best").config.block_size == 48
    assert gptfast("train", "--resume", "--max-steps", 3, "--out", tmp_path / "b") == 0
    for options, text in (
        (("--extend-context", 48, "--block-size", 32), "--extend-context is the new --block-size"),
        (("--rope-scaling", "yarn"), "--rope-scaling goes with --extend-context"),
        (("--block-size", 48), "interpolate them with --extend-context 48"),
    ):
        assert gptfast(*start, *options, *quick, "--out", tmp_path / "c") == 1
        assert text in capsys.readouterr().err
    assert gptfast("train", "--extend-context", 48, "--out", tmp_path / "c") == 1
    assert "--extend-context goes with --init-from" in capsys.readouterr().err


def test_a_model_is_fine_tuned_at_a_longer_context(tmp_path: Path, capsys):
    base(tmp_path / "base", n_embd=16)
    before = GPT.from_pretrained(tmp_path / "base").config.block_size
    assert run_finetune(tmp_path, "--extend-context", str(2 * before), task="lm") == 0, capsys.readouterr().err
    assert GPT.from_pretrained(tmp_path / "out/best").config.block_size == 2 * before
    assert run_finetune(tmp_path, "--extend-context", "64", "--method", "lora", task="lm") != 0
    assert "--extend-context has no effect with --method lora; it is for full" in capsys.readouterr().err
