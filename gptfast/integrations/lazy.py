"""Outputs of language models whose logits are computed when they are read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel.distributed import _DDPSink
from torch.utils._pytree import tree_map_only

_CLASSES: dict[type, type] = {}
_DEPTH = (
    3  # frames from the function that copies to the one that is told of it: a generator's, and those of later versions
)
_COMPUTE = "_gptfast_compute"


class Later(NamedTuple):
    """Logits that are computed when they are read.

    compute: returns them.
    hidden, weight: what they are the product of.
    shape, dtype: of the result.
    """

    compute: Callable[[], Tensor]
    hidden: Tensor
    weight: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


def lazy(outputs: Any, later: Later) -> Any:
    """A transformers `ModelOutput` that has a loss, whose logits are computed when they are first read.

    Attributes, indices, `keys`, `items`, `to_tuple`, iteration, pickles and copies see the logits as in the plain output,
    which it is from then on. The loss can be read without them, and so can `items` and `values`: transformers' Trainer lists
    them in an evaluation that reads nothing but the loss, accelerate in every step in mixed precision, to make them fp32, and
    DistributedDataParallel in every step that looks for unused parameters, as Trainer's do.
    """
    original = type(outputs)
    if original not in _CLASSES:
        _CLASSES[original] = type(original.__name__, (_Lazy, original), {"__module__": original.__module__})
    object.__setattr__(outputs, "__class__", _CLASSES[original])
    vars(outputs)[_COMPUTE] = later
    return outputs


class _Lazy:
    """Before the output's own class in the order of bases: completes the output, and hands over to the plain class."""

    def _plain(self) -> Any:
        later = vars(self).pop(_COMPUTE, None)  # None: the caller has called type(outputs)(…)
        object.__setattr__(self, "__class__", type(self).__mro__[2])
        return later

    def _complete(self) -> Any:
        later = self._plain()
        if later is not None:
            self.logits = later.compute()
        return self

    def items(self) -> Any:
        later = vars(self).get(_COMPUTE)
        if later is None:
            return self._complete().items()
        found = [(field.name, vars(self)[field.name]) for field in fields(self)]  # pyright: ignore[reportArgumentType]
        waiting = _waiting(self, later, later.dtype)
        return [(n, waiting if n == "logits" else x) for n, x in found if n == "logits" or x is not None]

    def values(self) -> Any:
        return [value for _, value in self.items()]

    @property
    def logits(self) -> Tensor:
        return self._complete().logits

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self._plain()
        self.logits = value

    def __getitem__(self, key: Any) -> Any:
        return vars(self)["loss"] if key in ("loss", 0) else self._complete()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._complete()[key] = value


def _completing(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._complete(), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in ("to_tuple", "get", "copy", "__repr__", "__eq__", "__or__"):
    setattr(_Lazy, _name, _completing(_name))
for _name in ("__reduce__", "__reduce_ex__"):
    setattr(_Lazy, _name, _completing(_name))
_Lazy.__hash__ = None  # type: ignore[assignment]


class _Waiting(Tensor):
    """Logits that have not been read yet. Every use computes them, except queries of shape, dtype and device."""

    _outputs: Any
    _later: Later

    @staticmethod
    def __new__(cls, outputs: Any, later: Later, dtype: torch.dtype) -> _Waiting:
        made = Tensor._make_wrapper_subclass(cls, later.shape, dtype=dtype, device=later.hidden.device)
        made._outputs, made._later = outputs, later
        return made

    def read(self) -> Tensor:
        """The logits, in the dtype of this tensor."""
        return self._outputs.logits.to(_DTYPE(self))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN:
                return func(*args, **(kwargs or {}))
            if func is Tensor.float and len(args) == 1 and not kwargs:
                return _waiting(args[0]._outputs, args[0]._later, torch.float32)
            if func is Tensor.clone and _is_copied_by_ddp():
                return _Waiting(args[0]._outputs, args[0]._later, _DTYPE(args[0]))
            args, kwargs = tree_map_only(_Waiting, _Waiting.read, (args, kwargs or {}))
            return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__


def _is_copied_by_ddp() -> bool:
    """Whether DistributedDataParallel copies its outputs in the function that tells it which of them backward uses. Other
    copies are of the logits as they are now."""
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None or frame.f_code is _DDPSink.forward.__code__:
            return frame is not None
        frame = frame.f_back
    return False


class _Product(torch.autograd.Function):
    """Makes a `_Waiting` a product of hidden and weight, also for what looks at neither its values nor its use: the `apply` of
    a user's autograd function."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, outputs: Any, later: Later, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = later.dtype
        return _Waiting(outputs, later, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            logits = F.linear(*(x.to(ctx.dtype) for x in inputs)).to(grads[0].dtype)
        return (*torch.autograd.grad(logits, inputs, grads[0]), None, None, None)


def _waiting(outputs: Any, later: Later, dtype: torch.dtype) -> Tensor:
    made: Any = _Product.apply(later.hidden, later.weight, outputs, later, dtype)
    return made


_DTYPE: Any = getattr(Tensor, "dtype").__get__  # noqa: B009
_KNOWN = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_meta", "grad_fn")
}
_KNOWN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
