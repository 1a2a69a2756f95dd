"""Checkpoints of gpt-oss' kind with their experts in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptfast import GPT, GPTConfig
from tests.support.engine_models import CONFIGS

OTHER = ("attn_softcap", "rotary_layout")  # what gpt-oss does not have
CONFIG = {name: x for name, x in CONFIGS["gptoss"].items() if name not in OTHER} | {"n_inner": 96, "dropout": 0.0}


def mxfp4_folder(folder: Path, **changes: Any) -> Path:
    """A folder of a random model, whose config.json and tensors are those of gpt-oss. changes: of CONFIG, whose experts have whole
    panels of 32 outputs."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**CONFIG, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                p.normal_(0, 0.3)
            elif name.endswith("router.weight"):
                p.mul_(16)  # or rounding sends tokens to other experts
    model.bfloat16().save_pretrained(folder)
    with_mxfp4(folder)
    return folder


def with_mxfp4(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write random blocks and scales of MXFP4 in the place of the experts' matrices of a folder of gpt-oss. Returns its tensors and
    its config.json."""
    file, tensors = folder / "model.safetensors", {}
    for name, x in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            E, rows, columns = x.shape
            tensors[name + "_blocks"] = torch.randint(256, (E, columns, rows // 32, 16), dtype=torch.uint8)
            tensors[name + "_scales"] = torch.randint(118, 126, (E, columns, rows // 32), dtype=torch.uint8)
        else:
            tensors[name] = x
    save_file(tensors, file)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["model_type"] == "gpt_oss"
    raw |= {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw))
    return tensors, raw
