"""pytorch_model.bin: read as safetensors are, with nothing but tensors let in."""

from __future__ import annotations

import json
import os
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gptfast.cli import app
from gptfast.models import GPT
from gptfast.models.locate import resolve
from tests.support.checkpoints import V, close_logits, hf, make, same

transformers = pytest.importorskip("transformers")
FORMATS = {"zip": {}, "before torch 1.6": {"_use_new_zipfile_serialization": False}}


def to_bin(folder: Path, options: dict | None = None, change=lambda tensors: tensors) -> Path:
    """The folder's safetensors as pytorch_model.bin instead."""
    single = folder / "model.safetensors"
    torch.save(change(load_file(single)), folder / "pytorch_model.bin", **(options or {}))
    single.unlink()
    return folder / "pytorch_model.bin"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make(tie_weights=False).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
def test_as_published_once(tmp_path: Path, kind: str, options: dict):
    """Names without a prefix, stored masks, a stored tied head."""
    theirs = hf(kind)
    theirs.save_pretrained(tmp_path)

    def change(tensors):
        new = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        new["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        new["h.1.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.uint8).tril()
        new["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        new["lm_head.weight"] = new["wte.weight" if kind == "gpt2" else "tokens_embed.weight"]
        return new

    to_bin(tmp_path, options, change)
    model = GPT.from_pretrained(tmp_path)
    close_logits(model, theirs)
    assert model.lm_head.weight is model.wte.weight
    model.save_pretrained(tmp_path)  # beside it: from now on the safetensors count
    (tmp_path / "pytorch_model.bin").write_bytes(b"no more")
    same(GPT.from_pretrained(tmp_path), model)


def test_equal_to_safetensors_in_every_bit(saved: Path):
    expected = GPT.from_pretrained(saved).to(torch.bfloat16)
    expected.save_pretrained(saved)
    path = to_bin(saved, change=lambda tensors: {k: torch.nn.Parameter(x) for k, x in tensors.items()})
    loaded = GPT.from_pretrained(saved)
    same(loaded, expected)
    path.write_bytes(bytes(path.stat().st_size))
    same(loaded, expected)
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


def test_shards(saved: Path):
    expected = GPT.from_pretrained(saved)
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    names = list(tensors)
    parts = {f"pytorch_model-{n + 1:05d}-of-00003.bin": names[n::3] for n in range(3)}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, saved / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(GPT.from_pretrained(saved), expected)
    assert "2 layers" in CliRunner().invoke(app, ["info", str(saved)]).output
    (saved / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks pytorch_model-00002-of-00003.bin of the 3 shards in pytorch_"):
        GPT.from_pretrained(saved)


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + str(Evil.target),)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_code_is_refused_and_does_not_run(saved: Path, options: dict):
    Evil.target = saved / "ran"
    to_bin(saved, options, lambda tensors: {**tensors, "x": Evil()})
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is a pickle that names posix.system.*not loaded - convert it"
    ):
        GPT.from_pretrained(saved)
    assert not Evil.target.exists()
    said = CliRunner().invoke(app, ["generate", "--model", str(saved), "--prompt", "a", "--tokenizer", "gpt2"])
    assert "names posix.system" in str(said.exception)
    assert not Evil.target.exists()


CONTENT = {
    "a list": (lambda t: list(t.values()), "the content is a list; expected a dictionary of tensors"),
    "a whole training": (lambda t: {"model": t, "step": 3}, "has a dict under 'model'; expected tensors under"),
    "a number": (lambda t: {**t, "step": 3}, "has a int under 'step'; expected tensors"),
    "numbers as names": (lambda t: {**t, 3: torch.zeros(1)}, "has a Tensor under 3; expected tensors"),
    "on meta": (lambda t: {**t, "lm_head.weight": torch.empty(V, 16, device="meta")}, "on meta; expected plain dense"),
    "sparse": (lambda t: {**t, "lm_head.weight": torch.zeros(V, 16).to_sparse()}, "sparse_coo on cpu; expected plain"),
    "expanded": (
        lambda t: {**t, "lm_head.weight": torch.zeros(1, 1).expand(2**31, 2**31)},
        r"has 'lm_head.weight' of shape \(2147483648, 2147483648\), more than is stored",
    ),
    "whole numbers": (
        lambda t: {**t, "lm_head.weight": torch.zeros(V, 16).long()},
        "has dtype torch.int64; expected a",
    ),
    "missing": (lambda t: {k: x for k, x in t.items() if k != "lm_head.weight"}, "lm_head.weight is missing"),
    "surplus": (lambda t: {**t, "transformer.h.7.x": torch.zeros(1)}, "transformer.h.7.x is unexpected"),
    "another shape": (lambda t: {**t, "lm_head.weight": torch.zeros(V, 8)}, r"lm_head.weight has shape \(97, 8\)"),
    "a wider model": (lambda t: {k: torch.cat([x, x], -1) for k, x in t.items()}, "n_embd is 16, but transformer.wte"),
}


@pytest.mark.parametrize("name", CONTENT)
def test_content_is_checked(saved: Path, name: str):
    change, message = CONTENT[name]
    to_bin(saved, change=change)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_damage_is_named_whatever_it_is(saved: Path, options: dict):
    """Cut anywhere, or with bytes changed: an error that names the file, or the model as it was stored."""
    path = to_bin(saved, options)
    whole, r = path.read_bytes(), random.Random(0)
    cuts = [0, 1, 3, 4, 100, len(whole) // 2, len(whole) - 1]
    flips = [(r.randrange(0, n), r.randrange(256)) for n in [200] * 60 + [len(whole)] * 20]
    for damaged in [*(whole[:n] for n in cuts), *(whole[:at] + bytes([b]) + whole[at + 1 :] for at, b in flips)]:
        path.write_bytes(damaged)
        cut = len(damaged) < len(whole)
        with pytest.raises(ValueError, match=re.escape(str(saved))) if cut else suppress(ValueError):
            GPT.from_pretrained(saved)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged or cut short, or no file of torch.save \("):
        GPT.from_pretrained(saved)


def test_a_hub_model_that_has_nothing_else(saved: Path, monkeypatch):
    import huggingface_hub

    to_bin(saved)
    asked = []

    def snapshot_download(name: str, revision: None, allow_patterns: list[str]) -> str:
        asked.append("pytorch_model*.bin" in allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(saved.parent)
    assert resolve("someone/old") == saved
    assert asked == [False, True]
