"""A valid call of every native op, then with one argument at a time replaced by a wrong one.

Run as a script, in a process that may crash: `python -m tests.support.native_calls gptfast|gptfast_emu`. It prints each case before it
runs it, and a line `FAULT …` for each answer that is neither a refusal nor finite numbers. All tensors end where readable
memory ends: who reads or writes behind one crashes.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import gptfast.ops

B, H, T, D, R, C, V = 2, 3, 5, 8, 6, 40, 37  # V and C above the ids in use
# take_dropout is Python: it looks its numbers up in a table and touches no memory.
NO_ARGUMENTS = {"cpu_isa", "cpu_isas", "cpu_rejected_isa", "take_dropout"}
REFUSALS = (
    AttributeError,
    KeyError,
    ZeroDivisionError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    NotImplementedError,
    MemoryError,
)
INTS = (-1, -(2**62), 2**31, 2**62, 2**63 - 1)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, -5.0, 1.5, 1e300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int32, torch.int64)
LONG = {"dropout_mask": (2**31,)}  # values that are legal and take long


def at_the_edge(x: Tensor) -> Tensor:
    """A contiguous copy whose last byte is followed by an inaccessible page."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    if x.device.type != "cpu" or not size:
        return x.clone()
    room = (size + page - 1) // page * page
    memory = mmap.mmap(-1, room + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), page, 0)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=room - size)
    return flat.copy_(x.reshape(-1)).view(x.shape)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(n: int) -> Tensor:
    return (7 * torch.arange(n)) % 11


def calls(ops: Any) -> dict[str, dict[str, Any]]:
    """Arguments of a valid call of each op; those that a schema does not have are left out."""
    q, k, v = random(B, H, T, D), random(B, H, T + 2, D), random(B, H, T + 2, D).flip(0)
    attention = {"causal": True, "scale": 0.3, "dropout_p": 0.1, "seed": 5, "offset": 3, "window": 4}
    attention |= {"q": q, "k": k, "v": v, "seq_lens": torch.tensor([4, 7]), "cu_seqlens": None}
    attention |= {"left_pad": torch.tensor([0, 2]), "sinks": random(H), "softcap": 1.5}
    out, statistics = invoke(ops, "causal_attention_fwd", attention)
    step = attention | {"q": q[:, :, :1], "k": k[:, :, :1], "v": v[:, :, :1], "keys": k, "values": v}
    step |= {"lengths": torch.tensor([3, T + 1]), "counters": torch.zeros(B * H).int(), "cache_ready": True}
    packed = {
        "k": q[:1].flip(2),
        "q": q[:1],
        "v": q[:1].flip(1),
        "seq_lens": None,
        "left_pad": None,
        "cu_seqlens": torch.tensor([0, 2, T]),
    }
    grouped = {"k": random(B, 1, T + 2, D), "v": random(B, 1, T + 2, D).flip(2)}
    rows, other, weight = random(R, C), random(R, C).flip(0), random(C)
    norm = {"x": rows, "weight": weight, "bias": weight.flip(0), "eps": 1e-5, "y_type": 0}
    _, mean, rstd = invoke(ops, "layer_norm_fwd", norm)
    norm |= {"mean": mean, "rstd": rstd, "bias_type": 0, "dy": other, "dtotal": rows, "total": rows}
    norm |= {"residual": other, "dropout_p": 0.1, "seed": 1, "offset": 2, "x_type": 0, "residual_type": 0}
    gates = {"gate": rows, "up": other, "dout": weight.expand(R, C), "interleaved": False, "alpha": 1.7, "shift": 1.0}
    turns = {"cos": random(V, 3), "sin": random(V, 3).flip(0), "positions": ids(B * T).view(B, T), "interleaved": False}
    loss = {"logits": random(R, V), "targets": ids(R), "ignore_index": -100, "label_smoothing": 0.1}
    loss |= {"dloss": random(R), "lse": invoke(ops, "cross_entropy_fwd", loss)[1]}
    drawing = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, "position": ids(R), "stream": ids(R)}
    tables = {"ids": ids(R).view(2, 3), "wte": random(V, C), "wpe": random(13, C), "positions": ids(R).view(2, 3)}
    keys, order = ids(R).sort(stable=True)
    head = {"backend": "cpu", "hidden": rows, "weight": random(V, C), "want_hidden": True, "want_weight": True}
    product = {"x": rows, "weight": random(V, C), "bias": random(V), "dy": random(R, V), "want_x": True}
    experts = product | {"offsets": torch.tensor([0, 2, 2, R]), "weight": random(3, V, C), "bias": random(3, V)}
    updates = {"a": [random(3, C)], "b": [random(V, 3)], "scales": [0.5], "spans": [1, R - 1], "rates": [0.1]}
    updates |= {"seeds": [5], "offsets": [3], "want_factors": [True, True]}
    low = invoke(ops, "lora_linear_fwd", product | updates)[1:] if hasattr(ops, "lora_linear_fwd") else []
    codes, scales = gptfast.ops.quantize_groups(product["weight"], "int8")
    few = {"codes": codes, "scales": scales, "bias": random(V), "format": "int8", "group_size": 32, "in_features": C}
    few |= {"x": rows, "dy": random(R, V)}
    four_bits = dict(zip(("codes", "scales"), gptfast.ops.quantize_nf4(random(V, 64)).rows(V), strict=True))
    many = few | four_bits | {"x": random(20, 64), "dy": random(20, V), "format": "nf4", "group_size": 64}
    half = {"x": random(3, 16), "weight": random(V, 16), "norm_weight": random(16), "residual": random(3, V)}
    decoding = {name: x.bfloat16() for name, x in half.items()} | {"bias": None, "norm_bias": None}
    decoding |= {"norm": "rms_norm", "eps": 1e-5, "activation": "gelu", "weights_ready": True}
    nf4 = gptfast.ops.quantize_nf4(random(V, 64), double=True)
    double = {"scales": nf4.absmax.view(V, -1), "nested_absmax": nf4.nested_absmax, "offset": nf4.offset}
    few, many = (arguments | {"nested_absmax": None, "offset": None} for arguments in (few, many))
    micro = dict(zip(("codes", "scales"), gptfast.ops.quantize_mxfp4(random(V, 70)), strict=True))
    micro = few | micro | {"x": random(3, 70), "dy": random(3, V), "format": "mxfp4", "in_features": 70}
    twice = many | double | {"x": random(2, 64), "dy": random(2, V), "in_features": 64}
    doubly_quantized = {f"quantized_linear_{way} double": twice for way in ("fwd", "bwd")}
    return {
        "quantized_linear_fwd mxfp4": micro,
        "quantized_linear_bwd mxfp4": micro,
        "quantized_linear_fwd": few,
        "quantized_linear_fwd many": many,
        "quantized_linear_bwd": few,
        "quantized_linear_bwd many": many | {"in_features": 64},
        **(doubly_quantized if ops is torch.ops.gptfast else {}),  # others get the scales decoded
        "quantized_decode": many | {"in_features": 64, "first": 0, "last": 64},
        "causal_attention_fwd": attention,
        "causal_attention_fwd packed": attention | packed,
        "causal_attention_fwd grouped": attention | grouped,
        "causal_attention_append": step,
        "linear_few": decoding,
        "causal_attention_bwd grouped": attention | grouped | {"dout": q.flip(1), "out": out, "statistics": statistics},
        "causal_attention_bwd": attention | {"dout": q.flip(1), "out": out, "statistics": statistics},
        "layer_norm_fwd": norm,
        "layer_norm_bwd": norm,
        "add_layer_norm_fwd": norm,
        "add_layer_norm_bwd": norm,
        "rms_norm_fwd": norm,
        "rms_norm_bwd": norm,
        "add_rms_norm_fwd": norm,
        "add_rms_norm_bwd": norm,
        "relu_squared_fwd": {"x": rows},
        "relu_squared_bwd": {"x": rows, "dout": other},
        "swiglu_fwd": gates | {"limit": 0.7},
        "swiglu_bwd": gates | {"limit": 0.7},
        "swiglu_fwd packed": gates | {"up": None, "limit": math.inf},
        "swiglu_bwd packed": gates | {"up": None, "limit": math.inf, "dout": other[:, : C // 2], "interleaved": True},
        "rotary": turns | {"x": q, "inverse": False},
        "rotary pairs": turns | {"x": q, "inverse": True, "positions": None, "interleaved": True},
        "gelu_fwd": norm | {"tanh": True},
        "gelu_bwd": norm | {"tanh": False, "dout": other},
        "cross_entropy_fwd": loss,
        "cross_entropy_bwd": loss,
        "cross_entropy_in_place": loss,
        "dropout": {"x": rows, "p": 0.3, "seed": 1, "offset": 2},
        "dropout_mask": {"matrices": 2, "rows": 3, "cols": 5, "p": 0.3, "seed": 1, "offset": 2},
        "sample": drawing | {"logits": random(R, V)},
        "sample_rows": drawing
        | {"logits": random(R, V), "options": torch.tensor([gptfast.ops.row_options(0.7, 5, 0.9)] * R)},
        "embedding_fwd": tables,
        "embedding_fwd places": tables | {"positions": None},
        "embedding_bwd": {"dout": rows, "keys": keys, "order": order, "table": random(V, C)},
        "gemm": {"a": rows, "b": random(C, V), "bias": random(V), "c": random(R, V), "pairs": False, "accumulate": True}
        | {"a_sums": None},
        "gemm sums": {
            "a": rows.t(),
            "b": random(R, V),
            "bias": None,
            "c": random(C, V),
            "pairs": True,
            "accumulate": False,
        }
        | {"a_sums": torch.zeros(C)},
        "grouped_gemm": {"a": rows, "b": random(3, V, C).mT, "c": random(R, V), "pairs": False, "least": 1, "most": R}
        | {"offsets": torch.tensor([0, 2, 2, R]), "bias": random(3, V)},
        "gemm_narrow": {"a": random(R, V).bfloat16(), "b": random(V, C), "c": random(R, C)},
        "gemm_few": {"a": rows, "b": random(R, V).bfloat16(), "c": random(C, V)},
        "linear_fwd": product,
        "linear_bwd": product | {"want_weight": True, "want_bias": True},
        "grouped_linear_fwd": experts,
        "grouped_linear_bwd": experts | {"want_weight": True, "want_bias": True},
        "lora_linear_fwd": product | updates,
        "lora_linear_bwd": product | updates | {"low": low, "want_weight": True, "want_bias": True},
        "linear_cross_entropy_fwd": loss | head,
        "linear_cross_entropy_bwd": loss | head,
        "linear_cross_entropy_total": loss | head,
        "linear_cross_entropy_scale": head | {"dtotal": random(1)[0], "dhidden": other, "dweight": random(V, C)},
        "dequantize_nf4": {"codes": ids(64).byte(), "absmax": random(2).abs(), "nested_absmax": None, "offset": None}
        | {"shape": [2, 64], "block_size": 64, "dtype": torch.float32},
        "keep_results": {"bytes": 1 << 28},
        "peak_flops": {"iterations": 10, "pairs": False},
        "signal_ns": {"rounds": 10},
        "set_cpu_isa": {"name": ""},
    }


def invoke(ops: Any, case: str, arguments: dict[str, Any]) -> Any:
    """The call with its tensors at the edge of memory; what it writes to counts as a result."""
    op = getattr(ops, case.split()[0]).default
    given = {a.name: place(arguments[a.name]) for a in op._schema.arguments if a.name in arguments}
    written = [given[a.name] for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    result = op(**given)
    result = tuple(result) if isinstance(result, list) else result
    return (*result, *written) if isinstance(result, tuple) else (result, *written) if written else result


def place(value: Any) -> Any:
    if isinstance(value, list):
        return [place(part) for part in value]
    if isinstance(value, Strided):
        return value.make()
    if isinstance(value, Tensor) and value.dim() == 2 and value.stride(0) == 1 and value.shape[0] > 1:
        return at_the_edge(value.t()).t()
    return at_the_edge(value) if isinstance(value, Tensor) else value


class Strided:
    """The same values with gaps between them, or with the dimensions stored in another order."""

    def __init__(self, x: Tensor, how: str) -> None:
        self.x, self.how = x, how

    def make(self) -> Tensor:
        if self.how == "reversed":
            order = tuple(range(self.x.dim()))[::-1]
            return at_the_edge(self.x.permute(order).contiguous()).permute(order)
        wide = torch.stack([torch.full_like(self.x, 77), self.x], -1)  # the last value ends the memory
        return at_the_edge(wide)[..., 1]


def holds_tensors(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) else value, Tensor)


def with_strides(value: Any, how: str) -> Any:
    return [Strided(x, how) for x in value] if isinstance(value, list) else Strided(value, how)


def other_tensors(x: Tensor) -> Iterator[tuple[str, Any]]:
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield str(dtype), x.to(dtype)
    for d in range(x.dim()):
        yield f"shorter in {d}", x.narrow(d, 0, x.shape[d] - 1)
        yield f"longer in {d}", torch.cat([x, x.narrow(d, 0, 1)], d)
        yield f"empty in {d}", x.narrow(d, 0, 0)
    if x.dim():
        yield "of fewer dimensions", x[0]
        yield "one value", x.flatten()[0]
    yield "of more dimensions", x[None]
    yield "on meta", x.to("meta")
    yield "missing", None
    if not x.is_floating_point():
        limits = torch.iinfo(x.dtype)
        for value in (n for n in (-1, 2**31, 2**62) if limits.min <= n <= limits.max):
            yield f"all {value}", torch.full_like(x, value)


def others(value: Any) -> Iterator[tuple[str, Any]]:
    """Replacements for an argument, each with its name."""
    if isinstance(value, Tensor):
        yield from other_tensors(value)
    elif isinstance(value, bool):
        yield str(not value), not value
    elif isinstance(value, int):
        yield from ((str(n), n) for n in INTS)
    elif isinstance(value, float):
        yield from ((str(f), f) for f in FLOATS)
    elif isinstance(value, list):
        yield "shorter", value[1:]
        yield "longer", [*value, value[0]]
        yield from ((f"first {what}", [other, *value[1:]]) for what, other in others(value[0]))
    elif value is None:
        yield "a vector", torch.ones(3)
    else:
        yield "another", "scalar no such"


def tensors_of(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, Tensor)]


def equal(case: str, a: Any, b: Any) -> bool:
    """Bit for bit; products may be another library's for another layout."""
    same = torch.equal if "linear" not in case else (lambda x, y: torch.allclose(x, y, rtol=1e-4, atol=1e-5))
    return all(same(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def is_finite(result: Any) -> bool:
    """-inf is attention's lse of a row that sees nothing."""
    parts = [part for part in tensors_of(result) if part.device.type != "meta"]
    return all(bool((part.isfinite() | (part == -math.inf)).all()) for part in parts)


def trouble(case: str, name: str, what: str, result: Any, right: Any, blind: bool) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if isinstance(result, Exception):
        text = str(result)
        if text.startswith("There were no tensor arguments"):  # torch's own, of a call that nobody makes
            return None
        return f"names a source file: {text}" if re.search(r"\.(cpp|h|cu|cuh)\b", text) else None
    if what in ("gaps", "reversed"):
        return None if equal(case, result, right) else "gave other values"
    # a GPU does not look at the values of ids and lengths, which gives nan where they are wrong
    unseen = blind and (what.startswith("all ") or case.startswith("embedding"))
    return None if is_finite(result) or unseen else "gave numbers that are not finite"


def try_all(ops: Any, case: str, arguments: dict[str, Any], blind: bool) -> None:
    known = [a.name for a in getattr(ops, case.split()[0]).default._schema.arguments]
    assert not set(known) - set(arguments), (case, known)
    right = invoke(ops, case, arguments)
    for name in known:
        value = arguments[name]
        strided = [(how, with_strides(value, how)) for how in ("gaps", "reversed") if holds_tensors(value)]
        for what, other in [*others(value), *strided]:
            if isinstance(other, int) and other in LONG.get(case, ()):
                continue
            print(f"{case}: {name} {what}", flush=True)
            try:
                result = invoke(ops, case, arguments | {name: other})
            except REFUSALS as error:
                result = error
            fault = trouble(case, name, what, result, right, blind)
            if fault:
                print(f"FAULT {case}: {name} {what} {fault}", flush=True)


def main(namespace: str) -> None:
    if namespace == "gptfast_emu":
        from tests.support import emulated

        emulated.load()
    ops = getattr(torch.ops, namespace)
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith(namespace + "::")}
    table = {case: arguments for case, arguments in calls(ops).items() if case.split()[0] in names}
    missing = names - NO_ARGUMENTS - {case.split()[0] for case in table}
    assert not missing, f"ops without a valid call: {missing}"
    for case, arguments in table.items():
        try_all(ops, case, arguments, namespace == "gptfast_emu")
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
