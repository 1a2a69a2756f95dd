"""Which modules of a GPT a configuration names: endings of names, whole names with or without "transformer.", or a regex."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches

from torch import nn

from gptfast._warn import warn
from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.adapter_config import LoraConfig
from gptfast.checkpoints.families import FAMILIES
from gptfast.nn.adapted import LORA, SAVED, LoraLinear, SavedLinear, adapter_modules
from gptfast.nn.difference import true_config
from gptfast.nn.linear import Linear
from gptfast.nn.quantized import QuantizedLinear
from gptfast.nn.transformer import Transformer

ALL_LINEAR = "all-linear"


def file_name(model: Transformer, name: str) -> str:
    """The name of a module in transformers' model of this architecture; ours where theirs has other modules."""
    return hf_layout.to_file(name + ".weight", adapter_kind(model)).removesuffix(".weight")


def adapter_kind(model: Transformer) -> str:
    """The architecture whose names adapters have. Llama and its like divide into several layers what is one here, and have
    our names: c_attn, not q_proj."""
    kind = hf_layout.model_type(true_config(model))
    return "gptfast" if kind in FAMILIES else kind


def targets(model: Transformer, config: LoraConfig) -> list[str]:
    """The linear layers that get updates.

    Raises:
        ValueError: a name that no module has (the nearest is suggested), or one of a module that is no linear layer.
    """
    wanted, modules = config.target_modules, _modules(model)
    _check_layers(model, config)
    linear = [name for name, module in modules.items() if type(module) in (*LORA, *LORA.values(), SavedLinear)]
    if wanted == ALL_LINEAR:
        found = [name for name in linear if name != "lm_head"]
    else:
        assert wanted is not None  # LoraConfig has a default
        found = _named(model, wanted, list(modules), "target_modules")
    left = [name for name in found if not _is_excluded(model, config, name)]
    for name in left:
        if name not in linear:
            raise ValueError(
                f"add_adapter: target_modules names {name} ({type(modules[name]).__name__}); low-rank updates are for the "
                f"linear layers ({_leaves(linear)}) - modules_to_save trains a copy of another module"
            )
        if isinstance(module := modules[name], SavedLinear):
            own = ", ".join(map(repr, module.modules_to_save))
            raise ValueError(
                f"add_adapter: target_modules names {name}, of which {own} has a trained copy (modules_to_save); name other "
                "modules, or delete that adapter"
            )
    if not left:
        beside = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
        fields = [f"{name}={getattr(config, name)!r}" for name in beside if getattr(config, name) not in (None, [], "")]
        said = " and ".join([f"target_modules={wanted!r}", *fields])
        raise ValueError(f"add_adapter: {said} leave no module; name others")
    for field, patterns in config.unmatched(left).items():
        warn(f"add_adapter: {field} has {patterns!r}, which fit no target module and change nothing", RuntimeWarning)
    return left


def _check_layers(model: Transformer, config: LoraConfig) -> None:
    layers = config.layers_to_transform
    for layer in layers if isinstance(layers, (list, tuple)) else () if layers is None else (layers,):
        if layer >= model.config.n_layer:
            raise ValueError(
                f"add_adapter: layers_to_transform has {layer}; the model has the layers 0 to {model.config.n_layer - 1}"
            )


def saved(model: Transformer, config: LoraConfig) -> list[str]:
    """The modules of which the adapter has copies, by `modules_to_save`."""
    modules = _modules(model)
    found = _named(model, config.modules_to_save or [], list(modules), "modules_to_save")
    for name in found:
        module = modules[name]
        if not isinstance(module, tuple(SAVED)) or name == "wpe" or isinstance(module, (LoraLinear, QuantizedLinear)):
            raise ValueError(
                f"add_adapter: modules_to_save names {name} ({type(module).__name__}); expected wte, a LayerNorm, or a linear "
                "layer in floats without low-rank updates"
            )
    return found


def _modules(model: Transformer) -> dict[str, nn.Module]:
    """The modules of the base."""
    own = adapter_modules(model)
    return {name: module for name, module in model.named_modules() if name and name not in own}


def _named(model: Transformer, wanted: list[str] | str, names: list[str], field: str) -> list[str]:
    """The modules that are meant, in the order of the model; each entry of a list must mean one."""
    if isinstance(wanted, str):
        matching = [n for n in names if _fits(model, n, wanted)]
        if not matching and any(_fits(model, n, [wanted]) for n in names):
            raise ValueError(
                f"add_adapter: {field} is the regular expression {wanted!r}, which no whole name matches; for names that end so "
                f"say [{wanted!r}]"
            )
        return _checked(matching, wanted, names, field)
    found: set[str] = set()
    for entry in wanted:
        found.update(_checked([n for n in names if _fits(model, n, [entry])], entry, names, field))
    return [name for name in names if name in found]


def _checked(found: list[str], entry: str, names: list[str], field: str) -> list[str]:
    if found:
        return found
    ends = {".".join(name.split(".")[k:]) for name in names for k in range(name.count(".") + 1)}
    near = get_close_matches(
        entry.removeprefix("transformer."), sorted(end for end in ends if not end[:1].isdigit()), n=1, cutoff=0.3
    )
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"add_adapter: {field} has {entry!r}, and no module of this model is called so{hint}")


def _fits(model: Transformer, name: str, wanted: list[str] | str) -> bool:
    called = {name, f"transformer.{name}", file_name(model, name)}
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, key) for key in called)
    return any(key == entry or key.endswith("." + entry) for key in called for entry in wanted)


def _is_excluded(model: Transformer, config: LoraConfig, name: str) -> bool:
    out = config.exclude_modules
    if out and _fits(model, name, out):
        return True
    copied = map(re.escape, config.modules_to_save or [])
    if any(re.match(rf"(^|.*\.){m}($|\..*)", f"transformer.{name}") for m in copied):
        return True
    layers = config.layers_to_transform
    if layers is None or layers == [] or isinstance(config.target_modules, str):
        return False
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    match = next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns or [r"[^.]*"])), None)
    return match is None or int(match[1]) not in ([layers] if isinstance(layers, int) else layers)


def _leaves(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def as_peft_has_them(model: Transformer, config: LoraConfig, found: list[str]) -> list[str] | str | None:
    """target_modules for the file: as given, where it means the same under transformers' names, else every name."""
    wanted, matches = config.target_modules, _matcher(config.target_modules)
    names = [
        name for name, module in _modules(model).items() if isinstance(module, (Linear, nn.Embedding)) or "norm" in name
    ]
    same = [n for n in names if matches(file_name(model, n))] == [n for n in names if matches(n) or n in found]
    return wanted if same or wanted == ALL_LINEAR else [file_name(model, name) for name in found]


def _matcher(wanted: list[str] | str | None) -> Callable[[str], bool]:
    if isinstance(wanted, str):
        return lambda key: re.fullmatch(wanted, key) is not None
    return lambda key: any(key == entry or key.endswith("." + entry) for entry in wanted or [])
