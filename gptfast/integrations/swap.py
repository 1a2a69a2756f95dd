"""Patching one instance: its class becomes a subclass that computes the same with gptfast.

The subclass adds no attributes, so `vars(module)`, parameters, hooks, `state_dict` and `isinstance` are as before, pickles and
deep copies carry the patch, and nothing but the class has to be put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=type[nn.Module])
_PATCHED: dict[type[nn.Module], type[nn.Module]] = {}


def patches(original: type[nn.Module]) -> Callable[[M], M]:
    """Class decorator: instances of exactly `original` may become instances of this subclass."""

    def register(patched: M) -> M:
        _PATCHED[original] = mark(patched, original)
        return patched

    return register


def mark(patched: M, original: type[nn.Module]) -> M:
    """Note in a subclass which class its instances had."""
    patched.gptfast_original = original  # pyright: ignore[reportAttributeAccessIssue]
    return patched


def derive(make: Callable[..., type[nn.Module]], original: type[nn.Module], *options: Any, **members: Any) -> Any:
    """A subclass of `original` that `make(original, *options)` returns, which is how copies and pickles of instances find it."""

    def reduce(self: nn.Module, protocol: Any = None) -> Any:
        return _empty, (make, original, *options), self.__getstate__()

    def new(cls: Any, *args: Any, **kwargs: Any) -> nn.Module:
        return original(
            *args, **kwargs
        )  # type(model)(config), type(model).from_pretrained(…): what is new is not patched

    members |= {"__reduce_ex__": reduce, "__new__": new, "__module__": original.__module__}
    return mark(type(original.__name__, (original,), members), original)


def _empty(make: Callable[..., type[nn.Module]], *arguments: Any) -> nn.Module:
    """An instance without state, for unpickling and copies."""
    return object.__new__(make(*arguments))


def patched_class(module: nn.Module) -> type[nn.Module] | None:
    """The subclass for this module, None where there is none. Other people's subclasses have none: what they compute may differ."""
    return _PATCHED.get(type(module))


def original_class(module: nn.Module) -> Any:
    """The class that a patched module had, None of another. A class that was made from the patched one, as by
    `torch.nn.utils.parametrize` and FSDP, counts as patched."""
    return getattr(type(module), "gptfast_original", None)


def check_restorable(name: str, module: nn.Module) -> None:
    """Raise RuntimeError if a patched module's class, or its own `forward`, has been changed since."""
    if "gptfast_original" not in vars(type(module)):
        raise RuntimeError(
            f"restore: {name} has become a {type(module).__name__} since it was patched, as by parametrisations or FSDP; "
            "undo that first"
        )
    if "forward" in vars(module):
        raise RuntimeError(
            f"restore: somebody has set {name}.forward since it was patched, as the package accelerate does; undo that first: "
            "its hooks by accelerate.hooks.remove_hook_from_module, mixed precision, as of a Trainer with bf16, by "
            "`del model.forward, model._is_accelerate_prepared`"
        )
