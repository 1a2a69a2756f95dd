"""Warnings about adapters that get no gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptfast._warn import warn
from gptfast.nn.adapted import adapter_modules
from gptfast.nn.selection import AdapterState, Selection


def watch(model: nn.Module, state: AdapterState, loss: Tensor) -> None:
    """Warn if adapters get no gradient from the first backward pass of a loss, as under checkpointing with use_reentrant."""
    if state.watched or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if not loss.requires_grad:
        state.watched = True
        return warn("GPT: the loss depends on no trained parameter; is an adapter active and enabled (set_adapter)?")

    def look() -> None:
        state.watched = True
        own = adapter_modules(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[0] in own]
        missing = [n for n, p in trained if p.grad is None]
        if missing and len(missing) < len(trained):  # none at all: torch.autograd.grad
            warn(
                f"GPT: {missing[0]} and {len(missing) - 1} more parameters of adapters got no gradient; checkpoint with "
                "use_reentrant=False"
            )

    loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(look))


def watch_rows(model: nn.Module, state: AdapterState, adapters: Selection | None) -> None:
    """Warn once if rows that are trained are under adapters that are not."""
    if state.told or adapters is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    state.told = True
    named = list(dict.fromkeys(name for part in adapters.parts for name in part.names))
    trained = {piece for n, p in model.named_parameters() if p.requires_grad for piece in n.split(".")}
    frozen = [name for name in named if name not in trained]
    if frozen:
        warn(
            f"GPT: adapter_names has {', '.join(map(repr, frozen))}, which get no gradient; to train adapters beside the "
            f"active ones call set_requires_grad({frozen!r})"
        )
