"""Outputs of language models whose logits are computed when somebody reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_CLASSES: dict[type, type] = {}
_COMPUTE = "_gptfast_compute"


def lazy(outputs: Any, compute: Callable[[], Tensor]) -> Any:
    """A transformers `ModelOutput` that has a loss, whose logits become `compute()` when they are first read.

    Attributes, indices, `keys`, `items`, `to_tuple`, iteration, pickles and copies see the logits as in the plain output,
    which it is from then on. The loss can be read without them.
    """
    original = type(outputs)
    if original not in _CLASSES:
        _CLASSES[original] = type(original.__name__, (_Lazy, original), {"__module__": original.__module__})
    object.__setattr__(outputs, "__class__", _CLASSES[original])
    vars(outputs)[_COMPUTE] = compute
    return outputs


class _Lazy:
    """Before the output's own class in the order of bases: completes the output, and hands over to the plain class."""

    def _plain(self) -> Any:
        compute = vars(self).pop(_COMPUTE, None)  # None: somebody has called type(outputs)(…)
        object.__setattr__(self, "__class__", type(self).__mro__[2])
        return compute

    def _complete(self) -> Any:
        compute = self._plain()
        if compute is not None:
            self.logits = compute()
        return self

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


for _name in ("items", "values", "to_tuple", "get", "copy", "__repr__", "__eq__", "__or__"):
    setattr(_Lazy, _name, _completing(_name))
for _name in ("__reduce__", "__reduce_ex__"):
    setattr(_Lazy, _name, _completing(_name))
_Lazy.__hash__ = None  # type: ignore[assignment]
