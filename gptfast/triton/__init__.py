"""The ops as Triton kernels: torch.ops.gptfast_triton.*, with the names and schemas of torch.ops.gptfast.

They serve GPUs for which no CUDA build exists (other NVIDIA generations, AMD), need no compiler at install time, and are
the readable twins of the CUDA kernels. Importing this package registers the operators; Triton itself is imported, and a
kernel compiled, when an operator first runs.

TRITON_INTERPRET=1, set before gptfast is imported, runs the kernels in Triton's interpreter on CPU tensors: slowly, for
tests and debugging. Its arithmetic on bfloat16 is wrong (Triton 3.6 to 3.9), so the kernels widen to float32 first; the
products of attention, which a GPU takes in bfloat16, are then taken in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "gptfast_triton"
INTERPRETING: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
OLDEST_GPU = (7, 0)  # what Triton's compiler can make code for

# The module of this package that implements each operator, which has the name of the function there.
SCHEMAS: dict[str, tuple[str, ...]] = {
    "layer_norm": (
        "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
        "layer_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, int bias_type) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)",
        "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, float dropout_p, "
        "SymInt seed, SymInt offset) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
        "add_layer_norm_bwd(Tensor? dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor mean, Tensor rstd, "
        "int bias_type, int x_type, int residual_type, float dropout_p, SymInt seed, SymInt offset) "
        "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    ),
    "gelu": (
        "gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor",
        "gelu_bwd(Tensor dout, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)",
    ),
    "dropout": ("dropout(Tensor x, float p, SymInt seed, SymInt offset) -> Tensor",),
    "embedding": (
        "embedding_fwd(Tensor ids, Tensor wte, Tensor? wpe, Tensor? positions) -> Tensor",
        "embedding_bwd(Tensor dout, Tensor keys, Tensor order, Tensor table) -> Tensor",
    ),
    "cross_entropy": (
        "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index, float label_smoothing) "
        "-> (Tensor loss, Tensor lse)",
        "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, int ignore_index, "
        "float label_smoothing) -> Tensor",
        "cross_entropy_in_place(Tensor(a!) logits, Tensor targets, Tensor? dloss, int ignore_index, "
        "float label_smoothing) -> Tensor",
    ),
    "causal_attention": (
        "causal_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? seq_lens, Tensor? cu_seqlens, bool causal, "
        "float scale, float dropout_p, SymInt seed, SymInt offset, int window) -> (Tensor out, Tensor statistics)",
    ),
    "causal_attention_bwd": (
        "causal_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor? seq_lens, "
        "Tensor? cu_seqlens, bool causal, float scale, float dropout_p, SymInt seed, SymInt offset, int window) "
        "-> (Tensor dq, Tensor dk, Tensor dv)",
    ),
    "sample": (
        "sample(Tensor logits, float temperature, int top_k, float top_p, int seed, Tensor position, Tensor stream) "
        "-> Tensor",
    ),
    "dequantize_nf4": (
        "dequantize_nf4(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, SymInt[] shape, "
        "int block_size, ScalarType dtype) -> Tensor",
    ),
    "quantized_linear": (
        "quantized_linear_fwd(Tensor x, Tensor codes, Tensor scales, Tensor? bias, str format, int group_size) -> Tensor",
        "quantized_linear_bwd(Tensor dy, Tensor codes, Tensor scales, str format, int group_size, SymInt in_features) "
        "-> Tensor",
    ),
}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # keeps the registrations alive


def register() -> None:
    """Make the operators, and with them backend="triton"; for CPU tensors where they are interpreted, else for GPUs."""
    from gptfast.backend import add_backend
    from gptfast.ops._common import adopt

    device = "cpu" if INTERPRETING else "cuda"
    for module, schemas in SCHEMAS.items():
        for schema in schemas:
            name = schema[: schema.index("(")]
            _library.define(schema)
            _library.impl(name, _launcher(module, name), device.upper())
    adopt(NAMESPACE)
    add_backend("triton", NAMESPACE, device)


def _launcher(module: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        function = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        first = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device_of(first):  # Triton launches on the current device
            return function(*args)

    return launch


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (on Linux the GPU builds of torch bring it)"
    if INTERPRETING or torch.cuda.is_available():
        return None
    build = "" if torch.version.cuda or torch.version.hip else " (it is a CPU build)"
    return (
        f"torch sees no GPU{build}: install a GPU build of torch and the driver, or set TRITON_INTERPRET=1 before "
        "importing gptfast to run the kernels slowly on the CPU"
    )


missing_reason: str | None = _missing()
_troubles: dict[int, str | None] = {}


def trouble(index: int | None) -> str | None:
    """Why Triton kernels cannot run on GPU number `index` (None: the current one), and what to do; None where they can.

    The GPU is asked once, here and not at import: a process that has touched CUDA cannot fork workers.
    """
    if missing_reason is not None or INTERPRETING or torch.version.hip:
        return missing_reason
    index = torch.cuda.current_device() if index is None else index
    if index not in _troubles and torch.compiler.is_compiling():
        return None  # not a question that can be traced; the launch would say
    if index not in _troubles:
        capability = torch.cuda.get_device_capability(index)
        old = f"this GPU has compute capability {capability[0]}.{capability[1]} and Triton needs 7.0 or newer"
        _troubles[index] = None if capability >= OLDEST_GPU else old
    return _troubles[index]
