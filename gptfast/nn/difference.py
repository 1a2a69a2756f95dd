"""Whether a GPT's modules still are what its config says.

A packed copy, a captured step and a checkpoint are made from the config and the parameters. They hold for the model only
while nothing else decides its answers: no other module, attribute or method, no hook. C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptfast.config import GPTConfig
from gptfast.nn.adapted import ADAPTED, LoraLinear, QuantizedLoraLinear, adapter_modules
from gptfast.nn.attention import CausalSelfAttention
from gptfast.nn.block import Block
from gptfast.nn.embeddings import Embeddings
from gptfast.nn.heads import Heads, HeadTransform
from gptfast.nn.layer_norm import LayerNorm
from gptfast.nn.linear import Linear
from gptfast.nn.mlp import MLP
from gptfast.nn.parts import Part, expected_parts
from gptfast.nn.position import sinusoids
from gptfast.nn.quantized import QuantizedLinear, empty
from gptfast.nn.rms_norm import RMSNorm
from gptfast.nn.rotary import rotary_tables
from gptfast.nn.soft_prompt import prompts_of
from gptfast.nn.transformer import Transformer

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
DROPOUTS = ("attn_pdrop", "resid_pdrop")
FREE = {  # an instance or a subclass may override these: forward does not use them
    *("__init__", "__doc__", "__module__", "__annotations__", "__repr__", "__parameters__", "__orig_bases__"),
    *("__dict__", "__weakref__", "__new__", "__init_subclass__"),
    *("__static_attributes__", "__firstlineno__", "__annotate_func__", "__annotations_cache__", "__qualname__"),
    *("extra_repr", "dump_patches", "training", "call_super_init", "_version", "_compiled_call_impl"),
    *(
        "tie_weights",
        "num_parameters",
        "flops_per_token",
        "_init_weights",
        "init_parameter",
        "train",
        "eval",
        "to",
        "zero_grad",
    ),
}


PLAIN_TENSORS = ("Parameter", "Tensor", "FakeTensor")  # subclasses of Tensor in other libraries compute differently
USUAL = vars(nn.Module()).keys()  # attributes of every module


def difference(
    model: Transformer, saved: bool = False, adapters: bool = False, patched: bool = False, codes: bool = False
) -> str | None:
    """The first difference between the model's modules and its config, in words; None: there is none.

    Whether the head is tied is read from the tensors, see `true_config`. Values of parameters are not compared.

    Args:
        model: a GPT.
        adapters: low-rank updates that are not merged, and soft prompts, are no difference.
        patched: methods of gptfast's own classes may be replaced, as probes of a running training do.
        codes: matrices held in 8 or 4 bits are no difference.
        saved: also compare what a checkpoint does not store: dropout rates, and the values of fixed embeddings.
    """
    told = None if model.adapters is None else _in_adapters(model, adapters)
    if told is not None:
        return told
    prompts = prompts_of(model)
    if prompts and not adapters:
        names = ", ".join(map(repr, prompts))
        return f"the model has the soft prompt {names} (save_adapter writes it, delete_adapter takes it out)"
    wanted, found = expected_parts(model.config), dict(model.named_modules(remove_duplicate=False))
    told = _in_classes(model, patched) or _in_blocks(model) or _global_hooks()
    if told is not None:
        return told
    for name, part in wanted.items():  # submodules follow their module
        told = _in_module(found[name], part, saved, codes) if name in found else "is missing"
        if told is not None:
            return f"{name or 'the model'} {told}"
    own = adapter_modules(model) if adapters else set()
    for name, module in found.items():
        if name not in wanted and name not in own:
            return f"{name}, a {type(module).__name__}, has no place in a GPT of this config"
    return _in_tables(model) if saved else None


def _in_adapters(model: Transformer, updates: bool) -> str | None:
    """updates: whether the model may have low-rank ones."""
    for name, module in model.named_modules():
        if isinstance(module, ADAPTED) and not (updates and isinstance(module, LoraLinear)):
            if not updates:
                names = ", ".join(map(repr, model.adapters.names if model.adapters else ()))
                return f"the model has the adapter {names}, which is not merged (merge_adapter)"
            own = ", ".join(map(repr, getattr(module, "modules_to_save", ())))
            return f"the adapter {own} has a copy of its own of {name} (modules_to_save)"
    return None


def check_values(op: str, model: Transformer) -> None:
    """Raise ValueError for a model whose parameters are on the meta device, and so have no values."""
    for name, x in model.named_parameters():
        if x.is_meta:
            raise ValueError(
                f"{op}: {name} is on the meta device, which holds no values; load them with GPT.from_pretrained, or make "
                "room with model.to_empty(device='cpu') and fill it"
            )


def true_config(model: Transformer) -> GPTConfig:
    """The model's config, with `tie_weights` as the tensors are."""
    tied = is_tied(model)
    return model.config if model.config.tie_weights == tied else model.config.replace(tie_weights=tied)


def is_tied(model: Transformer) -> bool:
    """Whether head and token embedding are one tensor, or two that share all of their memory."""
    head, embedding = model.lm_head.weight, model.wte.weight
    if head is embedding:
        return True
    if head.shape != embedding.shape or head.dtype != embedding.dtype or head.device != embedding.device:
        return False
    return (
        head.device.type != "meta" and head.data_ptr() == embedding.data_ptr() and head.stride() == embedding.stride()
    )


def _in_classes(model: Transformer, patched: bool) -> str | None:
    """A subclass may add methods but not override what forward uses; methods of our classes may be replaced if `patched`."""
    for kind in type(model).__mro__[: type(model).__mro__.index(Transformer)]:
        ours = patched and kind.__module__.startswith("gptfast.")
        for name in () if ours else vars(kind):
            if name not in FREE and (hasattr(Transformer, name) or name in model._modules):
                return f"the model is a {type(model).__name__}, in which {kind.__name__} overrides {name}"
    for kind, methods in () if patched else _methods.items():
        if _methods_of(kind) != methods:
            return f"a method of the class {kind.__name__} was replaced"
    return None


def _in_blocks(model: Transformer) -> str | None:
    blocks, wanted = getattr(model, "h", None), model.config.n_layer
    count = len(blocks) if isinstance(blocks, nn.ModuleList) else wanted  # another class is reported later
    return None if count == wanted else f"h has {count} blocks and the config says n_layer={wanted}"


def _global_hooks() -> str | None:
    hooked = any(getattr(nn.modules.module, name, None) for name in GLOBAL_HOOKS)
    return "a forward hook of all modules (torch.nn.modules.module) is registered" if hooked else None


def _in_module(module: nn.Module, part: Part, saved: bool, codes: bool) -> str | None:
    """The first difference from `part`; the message continues the module's name."""
    kind = type(module)
    held = codes and kind in (QuantizedLinear, QuantizedLoraLinear)
    if (
        kind is not part.kind
        and not (part.kind is Linear and (kind is LoraLinear or held))
        and not (part.root and issubclass(kind, part.kind))
    ):
        return (
            f"is a {kind.__module__}.{kind.__qualname__}; the config says {part.kind.__module__}.{part.kind.__name__}"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    for name in vars(module).keys() - USUAL:
        if name not in FREE and _is_code(getattr(kind if held else part.kind, name, None)):
            return f"has {name} replaced on the instance"
    for name, value in part.attributes.items():
        got = getattr(module, name, None)
        if got != value and (saved or name not in DROPOUTS):
            return f"has {name}={got!r} and the config says {value!r}"
    return _in_codes(module, part.shapes) if held else _in_tensors(module, part.shapes)


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, property)


def _in_tensors(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str | None:
    own: dict[str, Tensor] = {n: x for n, x in {**module._parameters, **module._buffers}.items() if x is not None}
    for name, x in own.items():
        if name not in shapes:
            return f"has {name}, a tensor of {tuple(x.shape)}, and the config says none"
        if tuple(x.shape) != shapes[name]:
            return f"has {name} of shape {tuple(x.shape)} and the config says {shapes[name]}"
        if type(x).__name__ not in PLAIN_TENSORS or not x.is_floating_point() or x.layout != torch.strided:
            return f"has {name}, a {type(x).__name__} of {x.dtype}; expected a plain parameter"
    return _missing(own, shapes)


def _in_codes(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """As `_in_tensors`, of a layer with codes in place of its weight."""
    assert isinstance(module, QuantizedLinear)
    N, K = shapes["weight"]
    double = module.nested_absmax is not None
    wanted = {name: (*x.shape,) for name, x in empty(N, K, module.format, double).items()}
    wanted |= {name: shape for name, shape in shapes.items() if name != "weight"}
    own = {n: x for n, x in {**module._parameters, **module._buffers}.items() if x is not None}
    for name, x in own.items():
        if tuple(x.shape) != wanted.get(name):
            return f"has {name} of shape {tuple(x.shape)} and the config says {wanted.get(name, 'none')}"
    return _missing(own, wanted)


def _missing(own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> str | None:
    missing = [name for name in shapes if name not in own]
    return f"has no {missing[0]} of its own, and the config says one of {shapes[missing[0]]}" if missing else None


def _in_tables(model: Transformer) -> str | None:
    """The first difference in what is computed from the config and not stored."""
    config = model.config
    if config.position_embedding == "sinusoidal" and not model.wpe.weight.is_meta:
        fixed = sinusoids(config.block_size, config.n_embd, model.wpe.weight.device).to(model.wpe.weight)
        return None if torch.equal(fixed, model.wpe.weight) else "wpe has other values than the config's sinusoids"
    if config.position_embedding == "rotary" and not model.rotary.cos.is_meta:
        own = model.rotary.cos, model.rotary.sin
        same = all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(own, rotary_tables(config), strict=True))
        return None if same else "rotary has other values than the config's angles"
    return None


def _methods_of(kind: type[nn.Module]) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if name not in FREE and _is_code(value)}


_methods: dict[type[nn.Module], dict[str, Any]] = {}


def remember_methods(*kinds: type[nn.Module]) -> None:
    """Record the current methods of classes, to detect libraries that replace them on the class."""
    _methods.update((kind, _methods_of(kind)) for kind in kinds)


remember_methods(Linear, LoraLinear, QuantizedLinear, QuantizedLoraLinear)
remember_methods(LayerNorm, RMSNorm, CausalSelfAttention, Block, MLP, Embeddings, Heads, HeadTransform, Transformer)
