"""The trained copies of modules that an adapter has by `modules_to_save`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gptfast.nn.adapted import SAVED, LoraLinear
from gptfast.nn.difference import USUAL
from gptfast.nn.selection import AdapterState
from gptfast.nn.transformer import Transformer


def add_copies(model: Transformer, paths: Sequence[str], tying: bool, name: str, state: AdapterState) -> None:
    """Give modules the copies of `modules_to_save`. tying: a head that is tied gets the copy of the embedding."""
    tied = tying and model.lm_head.weight is model.wte.weight
    for path in [*paths, *(["lm_head"] if tied and "wte" in paths and "lm_head" not in paths else [])]:
        module = model.get_submodule(path)
        original = next(kind for kind in SAVED if isinstance(module, kind))
        copy = _like(original, module)
        if type(module) is original:
            module.__class__ = SAVED[original]
            module.modules_to_save, module.state = nn.ModuleDict(), state  # pyright: ignore
        module.modules_to_save[name] = copy  # pyright: ignore
    if tied and "wte" in paths:
        model.lm_head.modules_to_save[name].weight = model.wte.modules_to_save[name].weight  # pyright: ignore


def check_tables(model: Transformer, tables: Sequence[str]) -> None:
    """Raise ValueError for copies of the embedding or head beside low-rank updates of the head, which would be of the base's."""
    tied = model.lm_head.weight is model.wte.weight
    if isinstance(model.lm_head, LoraLinear) and ("lm_head" in tables or (tables and tied)):
        own = ", ".join(map(repr, model.lm_head.lora_A))
        raise ValueError(
            f"load_adapter: the file has rows of new tokens for lm_head, of which {own} has low-rank updates; load it without that "
            "adapter, or give the base its tokens, save_pretrained it and train the adapters on that"
        )


def _like(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """A plain module with copies of the parameters of another, without its hooks."""
    copy = kind.__new__(kind)
    nn.Module.__init__(copy)
    own = vars(module).keys() - USUAL - {"state", "number"}
    copy.__dict__.update({key: vars(module)[key] for key in own}, training=module.training)
    copy._parameters.update({key: _copied(p) for key, p in module._parameters.items()})
    return copy


def _copied(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach().clone())


def check_copies(model: Transformer, op: str, names: Sequence[str]) -> None:
    """Raise ValueError for adapters of which several have a copy of one module: copies cannot be added up."""
    for path, module in model.named_modules():
        own = [n for n in names if isinstance(module, tuple(SAVED.values())) and n in module.modules_to_save]  # pyright: ignore
        if len(own) > 1:
            raise ValueError(
                f"{op}: {', '.join(map(repr, own))} each have a copy of {path} (modules_to_save), and copies cannot be added "
                "up; take one of them"
            )
