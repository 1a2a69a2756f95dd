"""Three mends to Triton's interpreter, which runs the op suite on the Triton kernels where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    _patch_the_language_once()
    _let_numbers_be_indices()
    _sum_products_in_one_order()


def _patch_the_language_once() -> None:
    """Every call of a function inside a kernel replaces some hundred names of triton.language once more, which takes most of
    the time. They stay as they are while the kernel runs."""
    patch = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_once(fn: Any) -> interpreter._LangPatchScope:
        return patch(everything) if tl.core.is_builtin(tl.load) else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def _let_numbers_be_indices() -> None:
    """Triton 3.6 takes int() of arrays of one element, which numpy 2.4 refuses. Newer versions have it so themselves."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: interpreter._LangPatchScope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _sum_products_in_one_order() -> None:
    """Products are numpy's, whose BLAS adds up the last rows and columns of a tile in another order on some CPUs: equal scores
    of 1e18 then differ by 1e11. A tensor core has one order for all. Sums in fp64, rounded once, are as good."""
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.data.dtype != np.float32:
            return dot(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
