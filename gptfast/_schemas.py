"""The schema of every operator: its name, arguments and results, as torch.library reads them.

This is the only place that states them. The compiled libraries (`m.impl` in csrc/bindings), the Triton kernels, the CUDA
emulator of the tests and the operators written in Python implement these schemas, each in a namespace of torch.ops. The fake
(shape function) of an operator stands beside its public function, in gptfast/ops/<op>.py.

`seed` and `offset` of dropout are SymInts: they change with every step, and torch.compile must not make a graph for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# By the file that implements them: csrc/bindings/<file>.cpp, cuda_<file>.cpp and gptfast/triton/<file>.py.
KERNELS: dict[str, tuple[str, ...]] = {
    "causal_attention": (
        "causal_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? seq_lens, Tensor? cu_seqlens, bool causal, "
        "float scale, float dropout_p, SymInt seed, SymInt offset, int window, Tensor? left_pad=None, Tensor? sinks=None, "
        "float softcap=0.0) -> (Tensor out, Tensor statistics)",
        "causal_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor? seq_lens, "
        "Tensor? cu_seqlens, bool causal, float scale, float dropout_p, SymInt seed, SymInt offset, int window, "
        "Tensor? left_pad=None, Tensor? sinks=None, float softcap=0.0) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    ),
    "cross_entropy": (
        "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index, float label_smoothing) "
        "-> (Tensor loss, Tensor lse)",
        "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, int ignore_index, "
        "float label_smoothing) -> Tensor",
        "cross_entropy_in_place(Tensor(a!) logits, Tensor targets, Tensor? dloss, int ignore_index, "
        "float label_smoothing) -> Tensor",
    ),
    "dequantize_nf4": (
        "dequantize_nf4(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, SymInt[] shape, "
        "int block_size, ScalarType dtype) -> Tensor",
    ),
    "dropout": ("dropout(Tensor x, float p, SymInt seed, SymInt offset) -> Tensor",),
    "embedding": (
        "embedding_fwd(Tensor ids, Tensor wte, Tensor? wpe, Tensor? positions) -> Tensor",
        "embedding_bwd(Tensor dout, Tensor keys, Tensor order, Tensor table) -> Tensor",
    ),
    "gelu": (
        "gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor",
        "gelu_bwd(Tensor dout, Tensor x, Tensor? bias, bool tanh) -> (Tensor dx, Tensor dbias)",
    ),
    "layer_norm": (
        "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps, int y_type) "
        "-> (Tensor y, Tensor mean, Tensor rstd)",
        "layer_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, int bias_type) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)",
        "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, float dropout_p, "
        "SymInt seed, SymInt offset, int y_type) -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
        "add_layer_norm_bwd(Tensor? dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor mean, Tensor rstd, "
        "int bias_type, int x_type, int residual_type, float dropout_p, SymInt seed, SymInt offset) "
        "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    ),
    "quantized_linear": (
        "quantized_linear_fwd(Tensor x, Tensor codes, Tensor scales, Tensor? bias, str format, int group_size, "
        "Tensor? nested_absmax=None, Tensor? offset=None) -> Tensor",
        "quantized_linear_bwd(Tensor dy, Tensor codes, Tensor scales, str format, int group_size, SymInt in_features, "
        "Tensor? nested_absmax=None, Tensor? offset=None) -> Tensor",
    ),
    "relu_squared": (
        "relu_squared_fwd(Tensor x) -> Tensor",
        "relu_squared_bwd(Tensor dout, Tensor x) -> Tensor",
    ),
    "rms_norm": (
        "rms_norm_fwd(Tensor x, Tensor? weight, float eps, int y_type) -> (Tensor y, Tensor rstd)",
        "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor dx, Tensor dweight)",
        "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, float eps, float dropout_p, SymInt seed, "
        "SymInt offset, int y_type) -> (Tensor y, Tensor total, Tensor rstd)",
        "add_rms_norm_bwd(Tensor? dy, Tensor? dtotal, Tensor total, Tensor? weight, Tensor rstd, int x_type, "
        "int residual_type, float dropout_p, SymInt seed, SymInt offset) "
        "-> (Tensor dx, Tensor dresidual, Tensor dweight)",
    ),
    "rotary": (
        "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor",
    ),
    "sample": (
        "sample(Tensor logits, float temperature, int top_k, float top_p, int seed, Tensor position, Tensor stream) "
        "-> Tensor",
        "sample_rows(Tensor logits, Tensor options, Tensor position, Tensor stream) -> Tensor",
    ),
    "swiglu": (
        "swiglu_fwd(Tensor gate, Tensor? up, bool interleaved, float alpha, float shift, float limit) -> Tensor",
        "swiglu_bwd(Tensor dout, Tensor gate, Tensor? up, bool interleaved, float alpha, float shift, float limit) "
        "-> (Tensor dgate, Tensor dup)",
    ),
}


class AttentionOptions(NamedTuple):
    """What a call of causal_attention is asked for besides q, k and v: the arguments that its two schemas end with, in their
    order. `ops.causal_attention` explains them."""

    seq_lens: Tensor | None = None
    cu_seqlens: Tensor | None = None
    causal: bool = True
    scale: float = 1.0  # of the scores
    dropout_p: float = 0.0
    seed: int = 0
    offset: int = 0
    window: int = 0  # 0: none
    left_pad: Tensor | None = None
    sinks: Tensor | None = None  # (H,) float32 in kernels
    softcap: float = 0.0  # 0: none


# Ops without a kernel in some compiled library: where there is none they run in PyTorch.
_NOT_COMPILED = {
    "cpu": {"dequantize_nf4"},
    "cuda": {"dequantize_nf4"},
}

# Functions of the compiled libraries that no other backend has.
CPU_LIBRARY = (
    "gemm(Tensor a, Tensor b, Tensor? bias, Tensor(a!) c, bool pairs, bool accumulate, Tensor(b!)? a_sums) -> ()",
    "gemm_few(Tensor a, Tensor b, Tensor(a!) c) -> ()",
    "grouped_gemm(Tensor a, Tensor offsets, Tensor b, Tensor? bias, Tensor(a!) c, bool pairs, int least, int most) -> ()",
    "gemm_narrow(Tensor a, Tensor b, Tensor(a!) c) -> ()",
    "quantized_decode(Tensor codes, Tensor scales, str format, int group_size, int in_features, int first, int last) "
    "-> Tensor",
    "dropout_mask(int matrices, int rows, int cols, float p, SymInt seed, SymInt offset) -> Tensor",
    "cpu_isa() -> str",
    "cpu_isas() -> str",
    "cpu_rejected_isa() -> str",
    "set_cpu_isa(str name) -> bool",
    "keep_results(int bytes) -> ()",
    "peak_flops(int iterations, bool pairs) -> float",
    "signal_ns(int rounds) -> float",
)
CUDA_LIBRARY = ("cuda_unavailable_reason(int device) -> str",)
# Kernels of csrc/cuda that no other backend has.
CUDA_KERNELS = (
    "causal_attention_append(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "Tensor(c!) counters, float scale, Tensor? sinks, float softcap, bool cache_ready) -> Tensor",
    "linear_few(Tensor x, Tensor weight, Tensor? bias, str norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "str activation, Tensor? residual, bool weights_ready) -> Tensor",
)

# Operators written in Python: torch.compile sees one call.
_LOSS = "Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float label_smoothing"
_FACTORS = "Tensor[] a, Tensor[] b"
_LOW_RANK = f"{_FACTORS}, float[] scales, SymInt[] spans, float[] rates, SymInt[] seeds, SymInt[] offsets"
PYTHON = (
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, bool want_x, bool want_weight, bool want_bias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    "grouped_linear_fwd(Tensor x, Tensor offsets, Tensor weight, Tensor? bias) -> Tensor",
    "grouped_linear_bwd(Tensor dy, Tensor x, Tensor offsets, Tensor weight, bool want_x, bool want_weight, bool want_bias) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    f"lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, {_LOW_RANK}) -> Tensor[]",
    f"lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, {_LOW_RANK.replace(_FACTORS, _FACTORS + ', Tensor[] low')}, "
    "bool want_x, bool want_weight, bool want_bias, bool[] want_factors) -> Tensor[]",
    f"linear_cross_entropy_fwd(str backend, {_LOSS}) -> Tensor",
    f"linear_cross_entropy_bwd(str backend, Tensor dloss, {_LOSS}, bool want_hidden, bool want_weight) "
    "-> (Tensor dhidden, Tensor dweight)",
    # with the gradients of the sum of the losses
    f"linear_cross_entropy_total(str backend, {_LOSS}, bool want_hidden, bool want_weight) "
    "-> (Tensor total, Tensor dhidden, Tensor dweight)",
    "linear_cross_entropy_scale(Tensor dtotal, Tensor hidden, Tensor weight, Tensor dhidden, Tensor dweight) "
    "-> (Tensor dhidden, Tensor dweight)",
    # device: torch.compile asks a random operator in a checkpointed region for the generator that it uses
    "take_dropout(SymInt counter, int n, int site, *, Device device) -> Tensor",
)
TAGS: dict[str, tuple[torch.Tag, ...]] = {"take_dropout": (torch.Tag.nondeterministic_seeded,)}

MISMATCH = "The compiled library and the Python sources do not belong together: rebuild with `python setup.py build_ext --inplace`"


def name_of(schema: str) -> str:
    """The operator that a schema describes."""
    return schema[: schema.index("(")]


def compiled(device: str) -> tuple[str, ...]:
    """The schemas that csrc/bindings implements for tensors on "cpu" or "cuda"."""
    return tuple(s for file, schemas in KERNELS.items() if file not in _NOT_COMPILED[device] for s in schemas)


@cache
def library(namespace: str) -> torch.library.Library:
    """The registrations made from Python in torch.ops.<namespace>; they last as long as this object."""
    return torch.library.Library(namespace, "FRAGMENT")


def define(namespace: str, schemas: Iterable[str]) -> None:
    """Define operators in torch.ops.<namespace>.

    Raises:
        ImportError: one of them exists: a library of an older build, which brings schemas of its own, was loaded.
    """
    for schema in schemas:
        try:
            library(namespace).define(schema, tags=TAGS.get(name_of(schema), ()))
        except RuntimeError as error:
            raise ImportError(
                f"torch.ops.{namespace}.{name_of(schema)} cannot be defined: {error}\n{MISMATCH}"
            ) from error


def check_library(namespace: str, device: str, schemas: Iterable[str], path: object) -> None:
    """Compare a library, which has been loaded, with the schemas that it is to implement for tensors of a device.

    Raises:
        ImportError: it lacks kernels, or has some that no schema describes: it was built from other sources.
    """
    keys = (device.upper(), "CompositeExplicitAutograd")
    names = [f"{namespace}::{name_of(schema)}" for schema in schemas]
    missing = [n for n in names if not any(torch._C._dispatch_has_kernel_for_dispatch_key(n, key) for key in keys)]
    if missing:
        raise ImportError(f"{path}: no kernel of {', '.join(missing)} for {device} tensors. {MISMATCH}")
    dangling = [line.split()[1] for line in torch._C._dispatch_find_dangling_impls()]
    unknown = [name for name in dangling if name.startswith(f"{namespace}::")]
    if unknown:
        raise ImportError(f"{path}: gptfast/_schemas.py has no schema of {', '.join(unknown)}. {MISMATCH}")
