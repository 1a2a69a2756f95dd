"""Lets one pass do a dropout, the residual sum after it and the LayerNorm that follows, though each is a module of its own.

A dropout that is held hands its input on, and says so; so does the head of a language model, whose loss needs no logits. A LayerNorm whose result came with the sum hands that out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from torch.nn.modules import module as hooks


def calls_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of forward. Those by which transformers records hidden states do not count: they are on what
    no pass changes."""
    return any("output_capturing" not in getattr(hook, "__name__", "") for hook in module._forward_hooks.values())


def is_watched(module: nn.Module) -> bool:
    """Whether others see the calls of a module, by hooks or a forward set on the instance."""
    own = calls_hooks(module)
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    everywhere = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
    everywhere = everywhere or hooks._global_backward_hooks or hooks._global_backward_pre_hooks
    return bool(own or others or everywhere or "forward" in vars(module))


def version_of(x: Tensor) -> int:
    """How often a tensor was written into. Those of `torch.inference_mode` do not count it: 0."""
    return 0 if x.is_inference() else x._version


class Held:
    """A module whose work is put off. input: what it was called with; None: it was not called, or had nothing to do."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.input: Tensor | None = None


class Ahead:
    """The LayerNorm that follows each block of a model, and the result that it will have."""

    def __init__(self, following: Mapping[nn.Module, nn.Module]) -> None:
        self._following = following
        self._known: tuple[nn.Module, Tensor, int, Tensor] | None = None

    def norm_after(self, block: nn.Module) -> nn.Module | None:
        return self._following.get(block)

    def put(self, norm: nn.Module, total: Tensor, normed: Tensor) -> None:
        self._known = norm, total, version_of(total), normed

    def take(self, norm: nn.Module, x: Tensor) -> Tensor | None:
        """norm(x), if an earlier pass has computed it; else None."""
        known, self._known = self._known, None
        if known is None or known[0] is not norm or known[1] is not x or known[2] != version_of(x):
            return None
        return known[3]


_held: ContextVar[Held | None] = ContextVar("gptfast_held", default=None)
_ahead: ContextVar[Ahead | None] = ContextVar("gptfast_ahead", default=None)


@contextmanager
def holding(module: nn.Module) -> Iterator[Held]:
    held = Held(module)
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


@contextmanager
def looking_ahead(following: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    token = _ahead.set(Ahead(following))
    try:
        yield
    finally:
        _ahead.reset(token)


def is_held(module: nn.Module, x: Tensor) -> bool:
    """Whether this call of a module is put off; its input is then kept in `Held`."""
    held = _held.get()
    if held is None or held.module is not module:
        return False
    held.input = x
    return True


def ahead() -> Ahead | None:
    """The `Ahead` of the model whose forward is running; None if that does not look ahead."""
    return _ahead.get()
