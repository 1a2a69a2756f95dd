"""The engine on experts in MXFP4: read from the mapped checkpoint as they lie, or packed with the same bits."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptfast
from gptfast import GPT, GPTConfig, engine
from gptfast.backend import has_cpu_ops
from gptfast.engine import CompiledGPT
from tests.support import ROOT
from tests.support.engine_models import ids_of, relative_error
from tests.support.mxfp4 import CONFIG, mxfp4_folder

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")

EXPERTS = {f"h.{n}.mlp.{own}" for n in range(2) for own in ("gate_up_proj", "down_proj")}


def test_experts_are_read_where_they_lie(tmp_path: Path, isa: str):
    """Their numbers to the bit, logits within the rounding of activations, and the bits of a packed model, for one row and many."""
    folder = mxfp4_folder(tmp_path)
    mapped = CompiledGPT.from_pretrained(folder, "mxfp4", threads=2)
    loaded = GPT.from_pretrained(folder)
    packed = loaded.compile_for_inference("mxfp4", threads=1)
    assert mapped._outside.keys() == EXPERTS and not packed._outside
    inside = memoryview(mapped._weights).nbytes
    codes = sum(x.nbytes for name, x in load_file(folder / "model.safetensors").items() if x.dtype == torch.uint8)
    assert mapped.nbytes - inside == codes == packed.nbytes - inside

    own = mapped.dequantized()
    for name in EXPERTS:
        assert torch.equal(own.get_parameter(name), loaded.get_parameter(name).float()), name
    ids = ids_of("gptoss")
    logits = mapped.logits(ids)
    with torch.no_grad(), gptfast.backend("eager"):
        exact = copy.deepcopy(own).double()(ids)
    assert relative_error(logits, exact) < 2e-2  # 1.74e-2, with AVX-512 BF16 1.76e-2: activations are bytes
    assert torch.equal(logits, packed.logits(ids))
    alone = mapped.runner(1)
    (slot,) = alone.allocate(1)
    steps = torch.cat([alone.extend([slot], [[token]]) for token in ids[0].tolist()])
    assert torch.equal(steps, logits[0])


def test_a_file_of_all_weights(tmp_path: Path):
    folder = mxfp4_folder(tmp_path / "folder")
    mapped = CompiledGPT.from_pretrained(folder, "mxfp4")
    with pytest.raises(ValueError, match=r"save: the experts are read from the mapped checkpoint; .* `file`"):
        mapped.save(tmp_path / "packed")
    written = CompiledGPT.from_pretrained(folder, "mxfp4", file=tmp_path / "packed")
    ids = ids_of("gptoss")
    assert torch.equal(engine.load(tmp_path / "packed").logits(ids), mapped.logits(ids))
    assert torch.equal(written.with_threads(1).logits(ids), mapped.with_threads(3).logits(ids))


def test_other_formats_decode_it(tmp_path: Path):
    folder = mxfp4_folder(tmp_path)
    compiled, model = CompiledGPT.from_pretrained(folder, "float32"), GPT.from_pretrained(folder).float()
    assert not compiled._outside
    assert relative_error(compiled.logits(ids_of("gptoss")), model(ids_of("gptoss")).detach()) < 1e-5


def test_damage_is_told(tmp_path: Path):
    folder = mxfp4_folder(tmp_path)
    file = folder / "model.safetensors"
    compiled = CompiledGPT.from_pretrained(folder, "mxfp4")
    compiled.logits([1, 2])
    os.utime(file, (1, 1))
    with pytest.raises(OSError, match="was changed, cut short or could not be read"):
        compiled.logits([1, 2])
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][-1, -1, -1] = 255
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"down_proj_scales holds 255, which stands for nan"):
        CompiledGPT.from_pretrained(folder, "mxfp4")
    tensors[name] = tensors[name][:, :-1].clone()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj_blocks has shape .* expected blocks"):
        CompiledGPT.from_pretrained(folder, "mxfp4")


@pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="not run from the source tree")
def test_a_random_checkpoint_in_shards(tmp_path: Path):
    """scripts/random_checkpoint.py: tensors by name and seed, in files that are mapped each, under the published names."""
    from scripts.random_checkpoint import described

    config = GPTConfig(**CONFIG)
    described(config, 5).write(tmp_path / "shards", 30_000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    tensors = {name: x for file in shards for name, x in load_file(file).items()}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert len(shards) > 5 and tensors[f"{name}_blocks"].shape == (5, 192, 2, 16)
    assert set(tensors[f"{name}_scales"].unique().tolist()) == {119, 120, 121}
    assert torch.equal(described(config, 5).read(f"{name}_blocks"), tensors[f"{name}_blocks"])
    assert not torch.equal(described(config, 6).read(f"{name}_blocks"), tensors[f"{name}_blocks"])
    mapped = CompiledGPT.from_pretrained(tmp_path / "shards", "mxfp4")
    packed = GPT.from_pretrained(tmp_path / "shards").compile_for_inference("mxfp4")
    assert len(list(mapped._files)) > 3
    assert torch.equal(mapped.logits(ids_of("gptoss")), packed.logits(ids_of("gptoss")))
