"""scripts/gguf_checkpoint.py: the numbers of the GGUF file, decoded by ggml's own package, are those of the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptfast.checkpoints.mxfp4 import mxfp4_values
from tests.support import ROOT
from tests.support.mxfp4 import mxfp4_folder

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(not (ROOT / "scripts").exists(), reason="not run from the source tree")


def read(file: Path) -> dict[str, torch.Tensor]:
    return {
        x.name: torch.from_numpy(gguf.quants.dequantize(x.data, x.tensor_type).copy())
        for x in gguf.GGUFReader(file).tensors
    }


def test_the_file_has_the_numbers_of_the_checkpoint(tmp_path: Path):
    from scripts.gguf_checkpoint import Type, write

    folder = mxfp4_folder(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    write(folder, tmp_path / "model.gguf", Type.BF16)
    found = read(tmp_path / "model.gguf")
    for layer in range(2):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        both = mxfp4_values(
            *(stored[f"{ours}.mlp.experts.gate_up_proj_{part}"] for part in ("blocks", "scales"))
        ).float()
        assert torch.equal(found[f"{theirs}.ffn_gate_exps.weight"], both[:, ::2])
        assert torch.equal(found[f"{theirs}.ffn_up_exps.weight"], both[:, 1::2])
        bias = stored[f"{ours}.mlp.experts.gate_up_proj_bias"].float()
        assert torch.equal(found[f"{theirs}.ffn_up_exps.bias"], bias[:, 1::2])
        down = mxfp4_values(*(stored[f"{ours}.mlp.experts.down_proj_{part}"] for part in ("blocks", "scales"))).float()
        assert torch.equal(found[f"{theirs}.ffn_down_exps.weight"], down)
        assert torch.equal(found[f"{theirs}.attn_q.weight"], stored[f"{ours}.self_attn.q_proj.weight"].float())
        assert torch.equal(found[f"{theirs}.attn_sinks.weight"], stored[f"{ours}.self_attn.sinks"].float())
    assert torch.equal(found["token_embd.weight"], stored["model.embed_tokens.weight"].float())
    assert len(found) == 2 * 19 + 3

    write(folder, tmp_path / "rounded.gguf", Type.Q8_0)
    rounded = read(tmp_path / "rounded.gguf")["output.weight"]
    torch.testing.assert_close(
        rounded, found["output.weight"], rtol=0, atol=float(found["output.weight"].abs().max() / 200)
    )


def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path):
    from scripts.gguf_checkpoint import Type, write

    folder = mxfp4_folder(tmp_path / "model", swiglu_limit=5.0, attention_pattern="LS")
    text = "swiglu_limit is 5.0; its layers are not banded and dense in turn; expected a checkpoint of gpt-oss"
    with pytest.raises(ValueError, match=re.escape(text)):
        write(folder, tmp_path / "model.gguf", Type.BF16)
    assert not (tmp_path / "model.gguf").exists()
