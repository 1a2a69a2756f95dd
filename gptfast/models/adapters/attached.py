"""Adapters of a model: putting them into its modules, taking them out, and which of them are active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptfast._warn import warn
from gptfast.checkpoints.adapter_config import AdapterConfig, LoraConfig
from gptfast.checkpoints.prompt_config import PromptTuningConfig, check_fits
from gptfast.models.adapters import prompts
from gptfast.models.adapters.copies import add_copies, check_copies, check_tables
from gptfast.models.adapters.targets import saved, targets
from gptfast.models.quantized import format_of
from gptfast.nn.adapted import (
    ADAPTED,
    HOLDERS,
    LORA,
    PROMPTS,
    LoraFactor,
    LoraFactors,
    LoraLinear,
    make_plain,
    number_of,
)
from gptfast.nn.quantized import QuantizedLinear
from gptfast.nn.selection import BASE, AdapterState, known_adapters
from gptfast.nn.soft_prompt import one_prompt, prompts_of
from gptfast.nn.transformer import Transformer


@dataclass
class Adapters(AdapterState):
    """The adapters of a GPT.

    configs: by name, in the order of adding.
    base: what the base was before the first of them, see `base_mark`.
    biases: values of the base's biases before an adapter trained them, by the names of parameters.
    trainable: names of the base's parameters that were trained before, and are again when the last adapter goes.
    quantized: formats of the bases on which adapters were trained, where these were quantised.
    aside: while adapters are merged, what was taken out of the modules; see `merging`.
    prompts: likewise the soft prompts.
    """

    configs: dict[str, AdapterConfig] = field(default_factory=dict)
    base: str = ""
    biases: dict[str, Tensor] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    quantized: dict[str, str] = field(default_factory=dict)
    aside: dict[str, Any] = field(default_factory=dict)
    prompts: nn.Module | None = None

    def follow(self) -> None:
        """Update `names` and `drops` from the configurations."""
        self.names = tuple(self.configs)
        self.drops = any(config.lora_dropout > 0 for config in self.configs.values() if isinstance(config, LoraConfig))


def adapters_of(model: Transformer, op: str) -> Adapters:
    """The adapters of a model. Raises ValueError if it has none."""
    if not isinstance(model.adapters, Adapters):
        raise ValueError(f"{op}: the model has no adapter; add one with add_adapter or load_adapter")
    return model.adapters


def check_not_merged(model: Transformer, op: str) -> None:
    state = model.adapters
    if isinstance(state, Adapters) and state.merged:
        raise ValueError(f"{op}: {', '.join(map(repr, state.merged))} is merged; call unmerge_adapter() first")


def add(
    model: Transformer, config: AdapterConfig, name: str, mark: str, blank: bool = False, tables: Sequence[str] = ()
) -> None:
    """Put an adapter into the modules, make it the active one, and freeze the base.

    Args:
        blank: its values are to be read from a file.
        tables: "wte" and "lm_head", of which the file of a soft prompt has other values than the base. It gets copies, which
            are not trained. A tied head follows the embedding, if it is not named.
    Raises:
        ValueError: a name that is taken or cannot be one, modules that do not exist, two adapters of which one trains
            the biases of the base, or a soft prompt that does not fit. The model is then as it was.
    """
    check_not_merged(model, "add_adapter")
    old = model.adapters if isinstance(model.adapters, Adapters) else None
    _check_name(name, old)
    if old is None:
        state = Adapters(base=mark, trainable={n for n, p in model.named_parameters() if p.requires_grad})
    else:
        state = old
    if isinstance(config, PromptTuningConfig):
        check_fits(model.config, config)
        check_tables(model, tables)
        weight = prompts.first_values(model, config, blank)
        _freeze(model, old)
        prompts.place(model, name, weight)
        add_copies(model, tables, "lm_head" not in tables, name, state)
    else:
        _add_lora(model, config, name, state, old)
    state.configs[name] = config
    if held := format_of(model):
        state.quantized[name] = held
    model.adapters = state
    state.follow()
    for _, parameter in parameters_of(model, name):
        parameter.requires_grad_(False)
    activate(model, name)
    if isinstance(config, LoraConfig) and config.inference_mode:  # as peft, which does not ask it of a soft prompt
        set_requires_grad(model, name, False)


def _freeze(model: Transformer, old: Adapters | None) -> None:
    for parameter in () if old else model.parameters():
        parameter.requires_grad_(False)


def _add_lora(model: Transformer, config: LoraConfig, name: str, state: Adapters, old: Adapters | None) -> None:
    where, copies = targets(model, config), saved(model, config)
    if old is not None and (config.bias != "none" or any(_trains_biases(c) for c in old.configs.values())):
        raise ValueError(
            f"add_adapter: {name!r} beside {', '.join(map(repr, old.configs))}, of which one has a bias other than "
            '"none": the biases of the base are one for all - use bias="none"'
        )
    factors = {path: _factors(model.get_submodule(path), path, config) for path in where}
    _freeze(model, old)
    for path, (a, b) in factors.items():
        number = number_of(path, model.config.n_layer)
        if number is None:  # a layer that a subclass has added
            number = 4 * model.config.n_layer
        _attach(model.get_submodule(path), name, state, a, b, number)
    add_copies(model, copies, config.ensure_weight_tying, name, state)
    for path, parameter in _trained_biases(model, config, where):
        state.biases[path] = parameter.detach().clone()


def _trains_biases(config: AdapterConfig) -> bool:
    return isinstance(config, LoraConfig) and config.bias != "none"


def _check_name(name: Any, state: Adapters | None) -> None:
    if not isinstance(name, str) or not name or "." in name or name == BASE or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"add_adapter: name is {name!r}; expected a text without dots that is no word of torch's")
    if state is not None and name in state.configs:
        raise ValueError(f"add_adapter: there is an adapter {name!r} already; delete it, or take another name")


def _factors(module: nn.Module, path: str, config: LoraConfig) -> tuple[LoraFactor, LoraFactor]:
    """A and B of one module, in fp32 beside half precision: small steps of an optimizer would be rounded away."""
    assert isinstance(module, nn.Linear)
    held = module.codes if isinstance(module, QuantizedLinear) else module.weight
    dtype = held.dtype if held.dtype == torch.float64 else torch.float32
    out, of, r = module.out_features, module.in_features, config.rank_of(path)
    a, b = (torch.empty(*shape, dtype=dtype, device=held.device) for shape in ((r, of), (out, r)))
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b) if config.init_lora_weights else nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    return LoraFactor(a, config.scale_of(path), config.lora_dropout), LoraFactor(b)


def _attach(module: nn.Module, name: str, state: AdapterState, a: LoraFactor, b: LoraFactor, number: int) -> None:
    if not isinstance(module, LoraLinear):
        module.__class__ = LORA[type(module)]
        module.lora_A, module.lora_B = LoraFactors(), LoraFactors()
        module.__dict__.update(state=state, number=number)
    assert isinstance(module, LoraLinear)
    module.lora_A[name], module.lora_B[name] = a, b
    module.train(module.training)


def _trained_biases(model: Transformer, config: AdapterConfig, where: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """The biases of the base that an adapter trains."""
    if not isinstance(config, LoraConfig) or config.bias == "none":
        return []
    plain = {n for n, m in model.named_modules() if "modules_to_save" not in n and "modules_to_save" not in m._modules}
    own = [(n, n.removesuffix(".bias"), p) for n, p in model.named_parameters() if n.endswith(".bias")]
    return [(n, p) for n, path, p in own if path in plain and (config.bias == "all" or path in where)]


def adapted_paths(model: Transformer, name: str) -> list[str]:
    """The modules that have low-rank updates of an adapter."""
    return [path for path, m in model.named_modules() if isinstance(m, LoraLinear) and name in m.lora_A]


def parameters_of(model: Transformer, name: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters that an adapter has, with the biases of the base that it trains."""
    ends = tuple(f".{kind}.{name}." for kind in HOLDERS)
    own = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if any(end in f".{n}" for end in ends)]
    return own + _trained_biases(model, adapters_of(model, "adapter").configs[name], adapted_paths(model, name))


def _trained(model: Transformer, name: str) -> list[tuple[str, nn.Parameter]]:
    """Of `parameters_of` those that training changes: of a soft prompt its vectors alone."""
    own = parameters_of(model, name)
    return [(n, p) for n, p in own if n.startswith(f"{PROMPTS}.")] if name in prompts_of(model) else own


def activate(model: Transformer, names: str | Sequence[str]) -> None:
    """Make adapters the ones that a forward uses, and the only ones that are trained."""
    check_not_merged(model, "set_adapter")
    state = adapters_of(model, "set_adapter")
    wanted = known_adapters("set_adapter", state.names, names)
    one_prompt("set_adapter", wanted, prompts_of(model))
    check_copies(model, "set_adapter", wanted)
    state.active = wanted
    state.enabled = True
    for name in state.configs:
        for _, parameter in _trained(model, name):
            parameter.requires_grad_(name in state.active)


def set_requires_grad(model: Transformer, names: str | Sequence[str], requires_grad: bool) -> None:
    """Train adapters, or freeze them, whichever are active."""
    check_not_merged(model, "set_requires_grad")
    state = adapters_of(model, "set_requires_grad")
    for name in known_adapters("set_requires_grad", state.names, names):
        for _, parameter in _trained(model, name):
            parameter.requires_grad_(requires_grad)


def enable(model: Transformer, enabled: bool) -> None:
    op = "enable_adapters" if enabled else "disable_adapters"
    check_not_merged(model, op)
    state = adapters_of(model, op)
    state.enabled = enabled
    if not enabled and state.biases:
        kind = next(config.bias for config in state.configs.values() if isinstance(config, LoraConfig))
        warn(f'disable_adapters: the biases of the base were trained (bias="{kind}") and stay so')


def delete(model: Transformer, names: str | Sequence[str]) -> None:
    """Take adapters out of the modules. Without the last one the model is what it was before the first."""
    check_not_merged(model, "delete_adapter")
    state = adapters_of(model, "delete_adapter")
    for name in known_adapters("delete_adapter", state.names, names):
        _restore_biases(model, state, name)
        for module in list(model.modules()):
            _detach(module, name)
        del state.configs[name]
        state.quantized.pop(name, None)
        state.follow()
    left = [name for name in state.active if name in state.configs] or list(state.configs)[:1]
    if left and left == list(state.active):  # what is trained beside them stays so, or frozen
        return
    if left:
        enabled = state.enabled
        activate(model, left)
        state.enabled = enabled
        return
    model.adapters = None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trainable)


def _restore_biases(model: Transformer, state: Adapters, name: str) -> None:
    if _trains_biases(state.configs[name]):
        with torch.no_grad():
            for path, value in state.biases.items():
                model.get_parameter(path).copy_(value)
        state.biases.clear()


def _detach(module: nn.Module, name: str) -> None:
    for kind in HOLDERS:
        held = module._modules.get(kind)
        if isinstance(held, nn.ModuleDict) and name in held:
            del held[name]
            if not held:
                del module._modules[kind]
    if isinstance(module, ADAPTED) and not ({"lora_A", "modules_to_save"} & module._modules.keys()):
        make_plain(module)
