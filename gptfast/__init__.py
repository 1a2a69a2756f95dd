"""gptfast: GPTs that train, fine-tune and generate fast on the machine you have."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gptfast._lazy import provide
from gptfast._version import __version__
from gptfast._when_imported import when_imported
from gptfast.integrations.names import register

if TYPE_CHECKING:
    from gptfast import engine, nn, ops
    from gptfast.backend import backend
    from gptfast.integrations import accelerate, restore
    from gptfast.malloc import tune_malloc
    from gptfast.models import BERT, GPT, GPTConfig

__all__ = [
    "BERT",
    "GPT",
    "GPTConfig",
    "__version__",
    "accelerate",
    "backend",
    "engine",
    "nn",
    "ops",
    "restore",
    "tune_malloc",
]

when_imported("transformers.modeling_utils", register)  # attn_implementation="gptfast", whichever is imported first

# Imported when first used, because torch takes seconds: `gptfast --help` does not wait for it, and what has to be set
# before torch loads can be. Every other name is a module of the package; `gptfast.backend` is one that can be called.
_CLASSES = {
    "BERT": "gptfast.models",
    "GPT": "gptfast.models",
    "GPTConfig": "gptfast.models",
    "accelerate": "gptfast.integrations",
    "restore": "gptfast.integrations",
    "tune_malloc": "gptfast.malloc",
}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        value = getattr(import_module(_CLASSES[name]), name)
    elif find_spec(f"gptfast.{name}"):
        value = import_module(f"gptfast.{name}")
    else:
        raise AttributeError(f"module 'gptfast' has no attribute {name!r}")
    globals()[name] = value
    return value


provide("GPT", lambda: __getattr__("GPT"))  # for the engine, which makes one of packed weights
provide("packed", lambda: import_module("gptfast.models.packed"))  # for the engine, which packs checkpoints


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
