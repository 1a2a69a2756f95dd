"""Checkpoints of gpt-oss' kind with their experts in MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
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


def random_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of the shape of experts' matrices (E, in, out)."""
    E, rows, columns = x.shape
    blocks = torch.randint(256, (E, columns, rows // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(118, 126, (E, columns, rows // 32), dtype=torch.uint8)


def nearest_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest blocks to experts' matrices (E, in, out), with the scales of the OCP's specification."""
    groups = x.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor().int() - 2
    values = torch.ldexp(groups, -exponents[..., None])
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (values.abs()[..., None] - table).abs().argmin(-1) | (values < 0).int() << 3
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), (127 + exponents).to(torch.uint8)


def with_mxfp4(
    folder: Path, codes: Callable[[Tensor], tuple[Tensor, Tensor]] = random_codes
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write blocks and scales of MXFP4 in the place of the experts' matrices of a folder of gpt-oss. Returns its tensors and its
    config.json."""
    file, tensors = folder / "model.safetensors", {}
    for name, x in load_file(file).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[name + "_blocks"], tensors[name + "_scales"] = codes(x)
        else:
            tensors[name] = x
    save_file(tensors, file)
    raw = json.loads((folder / "config.json").read_text())
    assert raw["model_type"] == "gpt_oss"
    raw |= {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(raw))
    return tensors, raw
