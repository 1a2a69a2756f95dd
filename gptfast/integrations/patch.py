"""`accelerate` and `restore`: which modules of a model are replaced, and by what."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptfast.integrations.modules import FLOATS, is_wrapped, own_gelu_class
from gptfast.integrations.report import Report
from gptfast.integrations.rerouted import functions_of, rerouted_class
from gptfast.integrations.swap import check_restorable, original_class, patched_class
from gptfast.integrations.written_out import written_out_class

OLDEST, NEWEST = (5, 0), (5, 24)  # transformers that this was tested with
LANGUAGE_MODELS = ("GPT2LMHeadModel", "GPT2DoubleHeadsModel", "OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel")
KINDS = (nn.LayerNorm, nn.GELU, nn.Dropout, nn.Linear, nn.CrossEntropyLoss)  # of `modules`


@dataclass(frozen=True)
class _Patch:
    module: nn.Module
    patched: type[nn.Module]
    told: str


def accelerate(model: nn.Module, *, generate: bool = True, verify: Any = None) -> Report:
    """Let a model of transformers, of nanoGPT or of your own compute with gptfast, in place.

    Every module that gptfast can compute gets a class that does; parameters, names, `state_dict`, hooks, `isinstance` and
    optimizers are as before, no class and no function of another package changes, and `restore` undoes it. What is not
    replaced runs as it did.

    transformers' GPT-2 and GPT-1: attention with padding on either side, packed documents and caches; the loss without
    holding the logits of all positions, which are computed when `outputs.logits` is read. Any module tree:
    `LayerNorm`, `GELU`, `Dropout`, `Linear`, `CrossEntropyLoss`, and calls of `F.scaled_dot_product_attention`, `F.layer_norm`,
    `F.gelu`, `F.dropout` and `F.cross_entropy` in a forward.

    Args:
        model: on one device, with float32, bfloat16 or float16 parameters.
        generate: whether `model.generate` of transformers' GPT-2 runs on gptfast where it can.
        verify: keyword arguments of a forward with labels, such as a batch of a DataLoader: both models run it, and the report
            holds errors and speed.
    Returns:
        What was replaced, and what was not and why.
    Raises:
        TypeError: no module.
        ValueError: patched already, nothing to replace, parameters on several devices or on "meta", a buffer on "meta", a
            batch without labels, without one that counts, or on another device.
        RuntimeError: transformers is older than 5.0.
        A model that is refused is as it was.
    """
    _check(model)
    report = Report()
    found = list(_patches(model, report, generate))
    if not found:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list(report.skipped.items())[:5])
        raise ValueError(
            f"accelerate: there is nothing to replace in this {type(model).__name__}: no LayerNorm, GELU, Dropout, Linear or "
            f"attention that gptfast computes{reasons}"
        )
    if verify is not None:
        from gptfast.integrations.verify import check_batch, verified

        check_batch(model, verify)
        report.errors, report.speedup = verified(model, verify, lambda: _apply(found), lambda: _undo(found))
    else:
        _apply(found)
    report.replaced = {name: patch.told for name, patch in found_names(model, found).items()}
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module has its class back. Parameters and settings stay as they are now.

    Raises:
        ValueError: the model is not patched.
        RuntimeError: somebody has changed a patched module since; named, with what to undo first. Nothing is restored then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model is a {type(model).__name__}; expected a torch.nn.Module")
    patched = [(name or "the model", module) for name, module in model.named_modules() if original_class(module)]
    if not patched:
        raise ValueError(f"restore: this {type(model).__name__} is not patched; accelerate(model) patches one")
    for name, module in patched:
        check_restorable(name, module)
    for _, module in patched:
        module.__class__ = original_class(module)


def _apply(found: list[_Patch]) -> None:
    try:
        for patch in found:
            patch.module.__class__ = patch.patched
    except BaseException:
        _undo(found)
        raise


def _undo(found: list[_Patch]) -> None:
    for patch in found:
        patch.module.__class__ = original_class(patch.module) or type(patch.module)


def found_names(model: nn.Module, found: list[_Patch]) -> dict[str, _Patch]:
    """The patches by module name."""
    by_id = {id(patch.module): patch for patch in found}
    return {name: by_id[id(module)] for name, module in model.named_modules() if id(module) in by_id}


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, module in model.named_modules():
        if original_class(module):
            raise ValueError(
                f"accelerate: {name or 'the model'} is already patched; restore(model) first to patch it again"
            )
    places = {}
    for name, tensor in model.named_parameters():
        places.setdefault(tensor.device, name)
    if any(device.type == "meta" for device in places):
        raise ValueError("accelerate: parameters are on the device meta, without values; load the weights first")
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise ValueError(
                f"accelerate: the buffer {name} is on the device meta, without values; make the model on a real device, or "
                "give the buffer its values first"
            )
    if len(places) > 1:
        told = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(
            f"accelerate: parameters are on more than one device ({told}); move the model to one device first"
        )
    if "transformers" in sys.modules and _is_of_transformers(model):
        _check_version(sys.modules["transformers"].__version__)


def _is_of_transformers(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("transformers.") for module in model.modules())


def _check_version(version: str) -> None:
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2])
    if numbers < OLDEST:
        raise RuntimeError(
            f"accelerate: transformers {version} is older than {OLDEST[0]}.{OLDEST[1]}, the oldest that this was tested with; "
            "pip install -U transformers"
        )
    if numbers > NEWEST:
        warnings.warn(
            f"accelerate: transformers {version} is newer than {NEWEST[0]}.{NEWEST[1]}, the newest that this was tested with; "
            "accelerate(model, verify=batch) compares the patched model with the unpatched one",
            stacklevel=3,
        )


def _patches(model: nn.Module, report: Report, generate: bool) -> Iterator[_Patch]:
    """The patches of a model; what is left alone goes into the report."""
    of_transformers = _is_of_transformers(model)
    shared: set[int] = set()
    if of_transformers:
        from gptfast.integrations import gpt2_block  # noqa: F401 (known to `patched_class` from here on)
        from gptfast.integrations.transformers_gpt import SHARED as shared
    alone: list[str] = []
    heads = set()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or any(name.startswith(prefix + ".") for prefix in alone):
            continue
        seen.add(id(module))
        if id(module) in shared:
            continue
        reason = _reason_to_leave(module)
        if reason:
            report.skipped[name] = reason
            if "cross-attention" in reason:
                alone.append(name)
            continue
        is_language_model = (
            of_transformers
            and type(module).__name__ in LANGUAGE_MODELS
            and type(module).__module__.startswith("transformers.")
        )
        if is_language_model:
            heads.add(id(module.get_output_embeddings()))  # type: ignore[operator]
        patch = _language_model(module, generate) if is_language_model else _part(module, id(module) in heads)
        if patch is None:
            continue
        if "forward" in vars(module):
            report.skipped[name] = "its forward was replaced on the instance"
            continue
        yield patch


def _language_model(module: nn.Module, generate: bool) -> _Patch:
    from gptfast.integrations.causal_lm import language_model_class

    generates = generate and type(module).__name__.endswith("LMHeadModel")
    told = "linear_cross_entropy, logits when they are read" + (
        "; generate by the native engine or captured steps" if generates else ""
    )
    return _Patch(module, language_model_class(type(module), generates), told)


def _part(module: nn.Module, is_head: bool) -> _Patch | None:
    """The patch of a module that is no language model; None where there is none."""
    if is_head and type(module) is nn.Linear:
        from gptfast.integrations.causal_lm import Head

        return _Patch(module, Head, "linear")
    if (patched := patched_class(module)) is not None:
        return _Patch(module, patched, _told(patched))
    if (gelu := own_gelu_class(module)) is not None:
        return _Patch(module, gelu, "gelu")
    if (attention := written_out_class(module)) is not None:
        return _Patch(module, attention, "causal_attention")
    if functions := functions_of(module):
        return _Patch(module, rerouted_class(type(module)), ", ".join(functions))
    return None


def _told(patched: type[nn.Module]) -> str:
    return {
        "LayerNorm": "layer_norm",
        "Dropout": "dropout",
        "Linear": "linear",
        "Conv1D": "linear",
        "CrossEntropyLoss": "cross_entropy",
        "GPT2Attention": "causal_attention",
        "OpenAIAttention": "causal_attention",
        "OpenAIMLP": "gelu",
        "GPT2MLP": "linear and gelu",
        "GPT2Block": "add_layer_norm",
        "GPT2Model": "add_layer_norm from block to block",
    }.get(patched.__name__, "gelu")


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why a module of a kind that could be replaced is left alone; None for what may be replaced, and for other kinds."""
    if getattr(module, "is_cross_attention", False):
        return "cross-attention"
    if patched_class(module) is None and isinstance(module, KINDS):
        if torch.nn.utils.parametrize.is_parametrized(module):
            return "parametrised"
        return f"a {type(module).__name__}, whose forward may differ from {_kind(module).__name__}'s"
    if patched_class(module) is None:
        return None
    if isinstance(module, nn.Dropout) and module.inplace:
        return "inplace"
    if any(parameter.dtype not in FLOATS for parameter in module.parameters(recurse=False)):
        return "parameters of another dtype than float32, bfloat16 and float16"
    wrapped = [type(parameter).__name__ for parameter in module.parameters(recurse=False) if is_wrapped(parameter)]
    if wrapped:
        return f"its parameters are {wrapped[0]}s"
    config = vars(module).get("config")
    if getattr(module, "reorder_and_upcast_attn", False) and getattr(config, "_attn_implementation", "") == "eager":
        return "reorder_and_upcast_attn"
    return None


def _kind(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in KINDS if isinstance(module, kind))
