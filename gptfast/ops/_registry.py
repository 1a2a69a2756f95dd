"""Properties of operators: fakes (shape functions), derivatives, the error of a double backward, operators written in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from gptfast import _schemas
from gptfast.backend import has_cpu_ops, namespace_of

Save = Callable[[Any, tuple[Any, ...], Any], None]  # (ctx, inputs, output)
Backward = Callable[..., Any]  # (ctx, call, *gradients of the outputs) -> a gradient of each input

_fakes: dict[str, Callable[..., Any]] = {}
_derivatives: dict[str, tuple[Save, Backward]] = {}


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the fake of the operator <name> for the compiled kernels; `register_properties` does so for other backends."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        shapes = _fakes[name] = _on_one_device(name, function)
        if has_cpu_ops and hasattr(torch.ops.gptfast, name):
            torch.library.register_fake(f"gptfast::{name}", shapes)
        return function

    return register


def _on_one_device(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a check that all tensors are on one device: torch calls a fake if any of them is on "meta", and the
    result for the others would be uninitialised."""

    def checked(*arguments: Any, **options: Any) -> Any:
        single = [part for x in arguments for part in (x if isinstance(x, (list, tuple)) else [x])]
        devices = {x.device for x in single if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(
                f"{op}: tensors on {' and '.join(sorted(map(str, devices)))}; expected all on one device"
            )
        return function(*arguments, **options)

    return checked


# Below autograd and below what notes views: a result that a kernel reshapes last is a tensor of its own, so that callers may
# write into it, as `nn.ReLU(inplace=True)` does. As a view made inside of an autograd function it would refuse that.
_untracked: Any = torch._C._AutoDispatchBelowADInplaceOrView

# ---- derivatives ----------------------------------------------------------------------------------------------------


def register_derivative(name: str, save: Save, backward: Backward) -> None:
    """Give the operator <name> its derivative, which also compiled and exported programs take.

    Args:
        name: of an operator that writes into none of its arguments.
        save: (ctx, inputs, output); keeps in ctx what backward needs.
        backward: (ctx, call, *gradients) to a tuple with a gradient, or None, for each argument of the operator.
            `call("gelu_bwd", ...)` calls another operator of the same backend. Neither writes into what is saved.
    """
    _derivatives[name] = save, backward
    if hasattr(torch.ops.gptfast, name):
        _register_autograd("gptfast", name)


def _register_autograd(namespace: str, name: str) -> None:
    save, backward = _derivatives[name]

    def differentiate(ctx: Any, *grads: Tensor) -> Any:
        return backward(ctx, caller(namespace), *grads)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, output)

    torch.library.register_autograd(f"{namespace}::{name}", differentiate, setup_context=setup)


def differentiable(name: str, save: Save, backward: Backward, eager: Callable[..., Any] | None = None) -> Any:
    """`register_derivative`, and the function of (backend, *arguments of the operator) by which `gptfast.ops` calls it.

    Called eagerly it goes through a `torch.autograd.Function`, which takes half the time of torch.library's machinery, and
    where nobody records it the kernel is called; while it is traced it is the operator itself. The derivative is the same.

    Args:
        name, save, backward: as in `register_derivative`.
        eager: computes the eager call instead of the operator.
    """
    register_derivative(name, save, backward)
    functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def call(backend: str, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return getattr(getattr(torch.ops, namespace_of(backend)), name)(*inputs)
        if backend not in functions:
            kernel = eager or getattr(getattr(torch.ops, namespace_of(backend)), name)
            functions[backend] = kernel, _recorder(name, namespace_of(backend), kernel)
        kernel, record = functions[backend]
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return record(*inputs)
        with _untracked():
            return kernel(*inputs)

    return call


def _recorder(name: str, namespace: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of a `torch.autograd.Function`, without what it does for torch.func, where no kernel runs."""
    save, backward = _derivatives[name]
    others = caller(namespace)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with _untracked():
            output = kernel(*inputs)
        ctx.set_materialize_grads(False)  # or each backward would fill gradients of 0 for the statistics
        save(ctx, inputs, output)
        return output

    def differentiate(ctx: Any, *grads: Any) -> Any:
        for grad in grads:
            if grad is not None:
                return backward(ctx, others, *grads)
        return (None,) * len(ctx.needs_input_grad)

    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function = type(f"{namespace}_{name}", (torch.autograd.Function,), members)
    above: Any = super(torch.autograd.Function, function)
    apply = above.apply

    def record(*inputs: Any) -> Any:
        return apply(*[unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in inputs])

    return record


def caller(namespace: str) -> Callable[..., Any]:
    """A function that calls operators of a namespace by name, past their own derivatives where autograd does not record."""
    operators = getattr(torch.ops, namespace)

    def call(name: str, *arguments: Any) -> Any:
        operator = getattr(operators, name)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return operator(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


def forbid_double_backward(op: str, name: str) -> None:
    """Make differentiating through the backward op <name> a clear error."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op}: double backward is not implemented by the fused kernels; use gptfast.backend('eager') for this part"
        )

    register_derivative(name, save, backward)


# ---- operators written in Python, and those of other backends ------------------------------------------------------


def define_python_op(name: str, function: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Register torch.ops.gptfast.<name>, written in Python, for tensors of any device: torch.compile sees one call.

    Args:
        name: of a schema in `_schemas.PYTHON`.
        function: the implementation.
        shapes: its fake.
    """
    library = _schemas.library("gptfast")
    _schemas.define("gptfast", [s for s in _schemas.PYTHON if _schemas.name_of(s) == name])
    library.impl(name, _below_autograd(_on_one_device(name, function)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptfast::{name}", _on_one_device(name, shapes), lib=library)


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what it calls unrecorded, as in a kernel: an exported graph calls operators where gradients are on,
    and the products that write into their result refuse that."""

    def unrecorded(*arguments: Any, **options: Any) -> Any:
        with _untracked():
            return function(*arguments, **options)

    return unrecorded


def register_properties(namespace: str) -> None:
    """Give the ops of another namespace of torch.ops, whose names and schemas are gptfast's, the same properties."""
    for name, function in _fakes.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)
    for name in _derivatives:
        if hasattr(getattr(torch.ops, namespace), name):
            _register_autograd(namespace, name)
