"""Ops on arbitrary shapes, strides, dtypes and options, beside eager PyTorch; and wrong arguments, which are errors.

The comparison is coarse, several times what the tests of the ops allow: it looks for what is wrong, not for what is inexact.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptfast import ops, testing
from gptfast.backend import cpu_isas, force_cpu_isa
from gptfast.ops import reference

from . import runner

SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200]
DTYPES = list(testing.DTYPES.values())
SEEDS = [0, 1, 2**32, 2**63, 2**64 - 1]
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    2**31,
    2**63,
    2**64,
    0.5,
    2.5,
    -0.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    b"",
    [],
    {},
    ...,
]
REFUSALS = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)
CALL = {"dequantize_nf4": 0, "quantized_linear": 1}  # arguments that stay as they were packed, from this one on


def run(seconds: float, seed: int = 0) -> runner.Report:
    """Call ops for about so many seconds."""
    return runner.campaign("ops", make, seconds, seed)


@dataclass(frozen=True)
class OddCase(testing.Case):
    """A case whose tensors lie in memory in unusual ways."""

    strides: int = 0

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor | None, ...]:
        rng = random.Random(self.strides)
        packed = CALL.get(self.op, 99)
        given = super().inputs(dtype, seed)
        return tuple(x if x is None or n >= packed else _laid_out(rng, x) for n, x in enumerate(given))


def _laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """The tensor (or, for "one row for all", another) with other strides."""
    how = rng.choice(["as it is", "as it is", "gaps", "transposed", "one row for all", "offset", "every other"])
    if how == "gaps":
        return torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() else x
    if how == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "one row for all" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand_as(x)
    if how == "offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if how == "every other" and x.dim():
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


def make() -> runner.Case:
    """A case calls one op."""
    torch.set_num_threads(1)

    def case(rng: random.Random) -> tuple[str, str | None]:
        op = rng.choice(list(OPS))
        dtype = rng.choice(DTYPES)
        made = replace(OPS[op](rng), strides=rng.randrange(1 << 30))
        with force_cpu_isa(rng.choice(cpu_isas())):
            if rng.random() < 0.4:
                return f"{op} refused", refused(rng, made, dtype)
            return op, compared(made, dtype)

    return case


# ---- right arguments ----


def compared(case: OddCase, dtype: torch.dtype) -> str | None:
    """How the op differs from eager PyTorch, or None."""
    try:
        ours = testing.run(getattr(ops, case.op), case, dtype)
        eager = testing.run(getattr(reference, case.op), case, dtype)
        exact = testing.run(getattr(reference, case.op), case, dtype, widen=torch.float64)
    except Exception:
        return f"{case} {dtype}\n{traceback.format_exc(limit=-4)}"
    for name, factor in (("outputs", 4), ("grads", 6)):
        for n, (a, e, x) in enumerate(
            zip(getattr(ours, name), getattr(eager, name), getattr(exact, name), strict=True)
        ):
            least = 16 * exact.upstream if name == "grads" else 1.0  # sums of a few hundred terms may cancel
            if (wrong := _difference(a, e, x, factor, least)) is not None:
                return f"{case} {dtype}\n{case.op}: {name}[{n}] {wrong}"
    return None


def _difference(ours: Tensor, eager: Tensor, exact: Tensor, factor: int, least: float) -> str | None:
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return f"is {ours.dtype} {tuple(ours.shape)}, eager {eager.dtype} {tuple(eager.shape)}"
    finite = eager.isfinite() & exact.isfinite()
    if not torch.equal(ours.isfinite() & finite, finite):
        return "is not finite where eager is"
    if not finite.any():
        return None
    error, theirs = ((t.double() - exact)[finite].abs().max().item() for t in (ours, eager))
    scale = max(exact[finite].abs().max().item(), least)
    limit = factor * theirs + (16 * torch.finfo(ours.dtype).eps + 64 * torch.finfo(torch.float32).eps) * scale
    return f"has an error of {error:.3g}, eager {theirs:.3g}, allowed {limit:.3g}" if error > limit else None


# ---- wrong arguments ----


def refused(rng: random.Random, case: OddCase, dtype: torch.dtype) -> str | None:
    """What is wrong with how an argument is refused that does not fit the others; it may also be taken."""
    args: list[Any] = list(case.inputs(dtype))
    options = dict(case.options)
    for n in rng.sample(range(len(args)), min(len(args), rng.choice([1, 1, 2]))):
        if rng.random() < 0.6 or not options:
            args[n] = _damaged(rng, args[n])
        else:
            name = rng.choice([*options, *NAMES.get(case.op, ())])
            options[name] = _damaged(rng, options.get(name))
    fn = getattr(ops, case.op)
    try:
        outputs = fn(*args, **options)
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            assert isinstance(out, Tensor) and (not out.is_floating_point() or out.double().sum() is not None)
    except REFUSALS as error:
        said = str(error)
        if case.op in said and "csrc" not in said and "dispatch" not in said:
            return None
        return f"{_shown(case.op, args, options)}\n{traceback.format_exc(limit=-3)}"
    except Exception:
        return f"{_shown(case.op, args, options)}\n{traceback.format_exc(limit=-3)}"
    return None


def _damaged(rng: random.Random, value: Any) -> Any:
    """Something else in the place of an argument; of a tensor often one that nearly fits."""
    if not isinstance(value, Tensor) or rng.random() < 0.15:
        return rng.choice(ODD)
    ways: list[Callable[[Tensor], Any]] = [
        lambda x: x[..., :-1] if x.dim() else x,
        lambda x: x[:-1] if x.dim() else x,
        lambda x: x[None],
        lambda x: x.reshape(-1),
        lambda x: x.sum() if x.is_floating_point() else x.reshape(-1)[:1].sum(),
        lambda x: x.t() if x.dim() == 2 else x.transpose(0, -1) if x.dim() else x,
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.long(),
        lambda x: x.to(torch.int8),
        lambda x: x.bool(),
        lambda x: x.to(torch.complex64),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse() if x.dim() and x.is_floating_point() else x,
        lambda x: x.repeat(*([1] * (x.dim() - 1)), 2) if x.dim() else x,
        lambda x: x.tolist(),
        lambda x: x.new_empty(0),
    ]
    return rng.choice(ways)(value)


def _shown(op: str, args: list[Any], options: dict[str, Any]) -> str:
    def short(x: Any) -> str:
        return f"{x.dtype} {tuple(x.shape)} {x.layout} {x.device}" if isinstance(x, Tensor) else f"{x!r:.40}"

    return f"{op}({', '.join(map(short, args))}, {', '.join(f'{k}={short(v)}' for k, v in options.items())})"


# ---- the ops ----


def _options(rng: random.Random, **choices: list[Any]) -> dict[str, Any]:
    """Some of the options, drawn independently of each other."""
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.4}


def _dims(rng: random.Random, names: str, **more: list[int]) -> dict[str, int]:
    return {name: rng.choice(SIZES) for name in names} | {name: rng.choice(values) for name, values in more.items()}


def _attention(rng: random.Random) -> OddCase:
    T = rng.choice(SIZES)
    packed = rng.random() < 0.2
    S = T if packed or rng.random() < 0.5 else rng.choice(SIZES)
    dims = {"B": 1 if packed else rng.choice([0, 1, 2, 3]), "H": rng.choice([1, 2, 3]), "T": T, "S": S}
    dims["D"] = rng.choice([1, 5, 8, 16, 31, 32, 33, 48, 64, 80, 100, 128, 200, 256])
    dims["sinks"] = rng.choice([0, 0, 1])
    options = _options(
        rng,
        causal=[True, False],
        softmax_scale=[0.0, -0.3, 1.0, 0.125],
        softcap=[0.0, 0.5, 3.0, 50.0],
        dropout_p=[0.1, 0.5, 1.0],
        seed=SEEDS,
        offset=[0, 7, 2**32 - 1],
        window=[1, 2, 17, 64, 1000],
        return_lse=[True],
    )
    if packed:
        inner = sorted(rng.randrange(T + 1) for _ in range(rng.choice([0, 1, 3])))
        options["cu_seqlens"] = torch.tensor([0, *inner, T], dtype=rng.choice([torch.int32, torch.int64]))
    elif rng.random() < 0.2:
        lengths = [rng.randrange(S + 1) for _ in range(dims["B"])]
        options["seq_lens"] = torch.tensor(lengths, dtype=rng.choice([torch.int32, torch.int64]))
    if rng.random() < 0.15:
        pads = [rng.randrange(S + 1) for _ in range(dims["B"])]
        options["left_pad"] = torch.tensor(pads, dtype=rng.choice([torch.int32, torch.int64]))
    if options.get("causal") is False:
        options.pop("window", None)
    return OddCase("causal_attention", dims, options, rng.choice(["contiguous", "strided"]))


def _norm(rng: random.Random, op: str) -> OddCase:
    dims = _dims(rng, "NC", bias=[0, 1], fp32_weights=[0, 0, 1], fp32_residual=[0, 1])
    dims["C"] = max(dims["C"], 3)  # of fewer, the gradient is 0 but for roundings times 1 / sqrt(variance + eps)
    options = _options(rng, eps=[1e-5, 1e-3, 1.0])
    if op == "add_layer_norm":
        options |= _options(rng, dropout_p=[0.1, 0.5, 1.0], seed=SEEDS, offset=[0, 2**32 - 1])
    return OddCase(op, dims, options, rng.choice(["contiguous", "strided"]))


def _rms(rng: random.Random, op: str) -> OddCase:
    case = _norm(rng, op)
    case.dims["no_weight"] = 1 - case.dims.pop("bias")
    if op == "add_rms_norm":
        case.options.update(_options(rng, dropout_p=[0.1, 0.5, 1.0], offset=[0, 2**32 - 1]))
        case.options["seed"] = rng.choice(SEEDS)
    return case


def _rotary(rng: random.Random) -> OddCase:
    D = rng.choice([2, 5, 8, 31, 32, 34, 64, 80, 128])
    dims = {"B": rng.choice([0, 1, 2, 3]), "H": rng.choice([1, 2, 3]), "T": rng.choice(SIZES), "D": D}
    dims |= {"R": 2 * rng.randint(1, D // 2), "n": dims["T"] + rng.choice([0, 1, 50])}
    options = _options(rng, layout=["neox", "interleaved"])
    if rng.random() < 0.5 and dims["n"]:
        shape = rng.choice([(dims["T"],), (1, dims["T"]), (dims["B"], dims["T"])])
        places = torch.randint(dims["n"], shape, generator=torch.Generator().manual_seed(rng.randrange(99)))
        options["positions"] = places.to(rng.choice([torch.int32, torch.int64]))
    return OddCase("rotary", dims, options, rng.choice(["contiguous", "strided"]))


def _swiglu(rng: random.Random) -> OddCase:
    options = _options(rng, alpha=[1.702, 0.5], limit=[7.0, 1.0])
    dims = _dims(rng, "NC", packed=[0, 1])
    if dims["packed"]:
        options |= _options(rng, layout=["halves", "interleaved"])
    return OddCase("swiglu", dims, options, rng.choice(["contiguous", "strided"]))


def _losses(rng: random.Random, op: str, names: str) -> OddCase:
    dims = {name: max(size, 1) for name, size in _dims(rng, names).items()}
    options = _options(rng, ignore_index=[-1, 0, -100], reduction=["mean", "sum", "none"], label_smoothing=[0.1, 1.0])
    return OddCase(op, dims, options)


def _quantized(rng: random.Random) -> OddCase:
    options = {"format": rng.choice(["int8", "int4", "nf4", "mxfp4"]), "group_size": rng.choice([32, 64, 128])}
    dims = _dims(rng, "N", M=SIZES[1:], C=[1, 33, 64, 100, 256], bias=[0, 1])
    if options["format"] == "nf4":
        dims["C"] = options["group_size"] * rng.choice([1, 3])
    if options["format"] == "mxfp4":
        options["group_size"] = 32
    return OddCase("quantized_linear", dims, options)


def _nf4(rng: random.Random) -> OddCase:
    shape = tuple(rng.choice(SIZES) for _ in range(rng.choice([1, 2, 3])))
    options = {"shape": shape, "block_size": rng.choice([16, 64, 512]), "dtype": rng.choice(DTYPES)}
    return OddCase("dequantize_nf4", {"double": rng.choice([0, 1]) if 0 not in shape else 0}, options)


OPS: dict[str, Callable[[random.Random], OddCase]] = {
    "causal_attention": _attention,
    "gelu": lambda rng: OddCase(
        "gelu",
        _dims(rng, "NC", bias=[0, 1]),
        _options(rng, approximate=["none", "tanh"]),
        rng.choice(["contiguous", "strided"]),
    ),
    "layer_norm": lambda rng: _norm(rng, "layer_norm"),
    "add_layer_norm": lambda rng: _norm(rng, "add_layer_norm"),
    "rms_norm": lambda rng: _rms(rng, "rms_norm"),
    "add_rms_norm": lambda rng: _rms(rng, "add_rms_norm"),
    "rotary": _rotary,
    "swiglu": _swiglu,
    "relu_squared": lambda rng: OddCase("relu_squared", _dims(rng, "NC"), {}, rng.choice(["contiguous", "strided"])),
    "dropout": lambda rng: OddCase(
        "dropout", _dims(rng, "NC"), {"p": rng.choice([0.0, 0.1, 1.0]), "seed": rng.choice(SEEDS)}
    ),
    "cross_entropy": lambda rng: _losses(rng, "cross_entropy", "NV"),
    "linear": lambda rng: OddCase(
        "linear", _dims(rng, "NM", C=SIZES[1:], bias=[0, 1]), _options(rng, activation=[None, "gelu", "gelu_tanh"])
    ),
    "linear_cross_entropy": lambda rng: _losses(rng, "linear_cross_entropy", "NCV"),
    "dequantize_nf4": _nf4,
    "quantized_linear": _quantized,
}
NAMES = {  # options that are damaged too where a case has not got them
    "causal_attention": [
        *("causal", "softmax_scale", "softcap", "dropout_p", "seed", "offset", "window"),
        *("left_pad", "seq_lens", "cu_seqlens"),
    ],
    "layer_norm": ["eps"],
    "add_layer_norm": ["eps", "dropout_p", "seed", "offset"],
    "rms_norm": ["eps"],
    "add_rms_norm": ["eps", "dropout_p", "seed", "offset"],
    "rotary": ["positions", "layout"],
    "swiglu": ["alpha", "limit", "layout"],
    "gelu": ["approximate"],
    "dropout": ["seed", "offset"],
    "cross_entropy": ["ignore_index", "reduction", "label_smoothing"],
    "linear_cross_entropy": ["ignore_index", "reduction", "label_smoothing"],
    "linear": ["activation"],
}
