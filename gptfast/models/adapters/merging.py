"""Merging adapters into the weights of their base, and back.

While adapters are merged the model is a plain GPT: its modules are of their own classes again, with merged parameters, and
what was taken out of them is kept aside. So the engine, checkpoints and captured steps take it as any other. Unmerging puts
the same parameters back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gptfast._warn import warn
from gptfast.checkpoints.prompt_config import PromptTuningConfig
from gptfast.models.adapters.attached import adapters_of
from gptfast.models.adapters.copies import check_copies
from gptfast.nn.adapted import ADAPTED, PROMPTS, LoraLinear, make_plain
from gptfast.nn.quantized import QuantizedLinear, dequantized, quantized
from gptfast.nn.selection import known_adapters
from gptfast.nn.transformer import Transformer

Parameters = dict[str, nn.Parameter | None]


def merge(model: Transformer, names: str | Sequence[str] | None) -> None:
    """Make the weights those of the base with the updates of some adapters; see `GPT.merge_adapter`.

    Raises:
        ValueError: unknown names, other adapters that are merged already, or updates that are not finite.
    """
    state = adapters_of(model, "merge_adapter")
    wanted = state.active if names is None else known_adapters("merge_adapter", state.names, names)
    if state.merged:
        if names is None or set(wanted) == set(state.merged):
            return
        raise ValueError(f"merge_adapter: {', '.join(map(repr, state.merged))} is merged; call unmerge_adapter() first")
    if not wanted:
        raise ValueError("merge_adapter: no adapter is active; name one")
    for name in wanted:
        if isinstance(state.configs[name], PromptTuningConfig):
            raise ValueError(
                f"merge_adapter: {name!r} is a soft prompt, which has no weights to add to the base's; keep it beside the base"
            )
    check_copies(model, "merge_adapter", wanted)
    found = {path: m for path, m in model.named_modules() if isinstance(m, ADAPTED)}
    merged = {path: _merged(path, module, wanted) for path, module in found.items()}
    for name in wanted:
        if name in state.quantized:
            _tell_drift(name, state.quantized[name], found, merged)
    for path, module in found.items():
        state.aside[path] = dict(module.__dict__), dict(module._parameters), dict(module._modules), type(module)
        module._modules.clear()
        make_plain(module)
        module._parameters.update(merged[path])
    state.prompts = model._modules.pop(PROMPTS, None)
    state.merged = wanted


def unmerge(model: Transformer) -> None:
    """Put the base and its adapters back. Without a merged one there is nothing to do."""
    state = adapters_of(model, "unmerge_adapter")
    for path, (attributes, parameters, modules, kind) in state.aside.items():
        module = model.get_submodule(path)
        for name in ("weight", "bias"):
            now, before = module._parameters.get(name), parameters.get(name)
            if isinstance(now, Tensor) and isinstance(before, Tensor) and now is not before:
                before.data = before.data.to(now.device, now.dtype)
        module._parameters.update(parameters)
        for held in modules.values():
            held.to(device=next(module.parameters()).device)
        module._modules.update(modules)
        module.__dict__.update({name: attributes[name] for name in ("state", "number") if name in attributes})
        module.__class__ = kind
        module.train(module.training)
    if state.prompts is not None:
        model.add_module(PROMPTS, state.prompts.to(device=model.wte.weight.device).train(model.training))
    state.prompts = None
    state.aside.clear()
    state.merged = ()


def _tell_drift(name: str, format: str, before: Mapping[str, nn.Module], merged: dict[str, Parameters]) -> None:
    """Warn by how much the merged weights would change if they were quantised again, and by how much the adapter changed them."""
    off = changed = norm = 0.0
    for path, parameters in merged.items():
        weight = parameters.get("weight")
        if weight is None or not isinstance(before[path], LoraLinear):
            continue
        exact = weight.detach().float()
        off += (dequantized(format, {**quantized(exact, format)})[:, : exact.shape[1]] - exact).square().sum().item()
        changed += (exact - before[path].weight.detach().float()).square().sum().item()  # pyright: ignore
        norm += exact.square().sum().item()
    if norm:
        warn(
            f"merge_adapter: {name!r} was trained on a base in {format}, and is merged into weights of more bits. In {format} "
            f"again these would be off by {(off / norm) ** 0.5:.2%} of their norm; the adapter changed "
            f"{(changed / norm) ** 0.5:.2%}"
        )


def _merged(path: str, module: nn.Module, names: Sequence[str]) -> Parameters:
    """The parameters of a module with its adapters merged."""
    if not isinstance(module, LoraLinear):
        own = [name for name in names if name in module.modules_to_save]  # pyright: ignore
        return dict(module.modules_to_save[own[0]]._parameters) if own else {}  # pyright: ignore
    updates = [name for name in names if name in module.lora_A]
    if not updates:
        return {}
    if isinstance(module, QuantizedLinear):
        raise ValueError(
            f"merge_adapter: {path} is held in {module.format}, whose few levels an update would be rounded away to; save_adapter, "
            "load the base without quantize, load_adapter there, and merge into its weights"
        )
    weight = module.weight.detach()
    total = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)
    for name in updates:
        a, b = module.lora_A[name], module.lora_B[name]
        total.addmm_(b.weight.detach().to(total.dtype), a.weight.detach().to(total.dtype), alpha=a.scale)
    result = total.to(weight.dtype)
    if not result.isfinite().all():
        raise ValueError(f"merge_adapter: {path}.weight would hold nan or infinities; the adapter is damaged")
    return {"weight": nn.Parameter(result, requires_grad=False)}
