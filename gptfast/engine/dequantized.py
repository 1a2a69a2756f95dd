"""The weights that the engine computes with, in a GPT of torch."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

from gptfast._lazy import provided
from gptfast.engine.formats import expert_of, of_expert
from gptfast.engine.runner import PANEL
from gptfast.nn.rotary import ROTARY_TABLES

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.metadata import Metadata


def dequantized(config: GPTConfig, metadata: Metadata, core: Any) -> Any:
    """A float32 `GPT` on the CPU, in evaluation mode, with the weights of a `gptfast._C.Engine`."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = provided("GPT")(config).float().eval()
    values = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name in core.weight_names():
        expert = expert_of(name)
        value = (values[name] if expert is None else values[expert[0]][expert[1]]).detach()
        if name == "wpe.weight":  # rows are padded to whole panels
            T, C = value.shape
            rows = torch.zeros(T, C + -C % PANEL, dtype=torch.float32, device="cpu")
            core.unpack(name, to_dlpack(rows.flatten()))
            value.copy_(rows[:, :C])
        elif expert is not None:
            rows = torch.empty_like(of_expert(value), memory_format=torch.contiguous_format)
            core.unpack(name, to_dlpack(rows))
            value.copy_(of_expert(rows))
        else:
            core.unpack(name, to_dlpack(value.flatten() if name in ROTARY_TABLES else value))
    model.metadata = replace(deepcopy(metadata), adapters={})  # these are not in it
    return model
