"""Draw a token from each row of logits, without sorting the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptfast import rng
from gptfast.backend import kernels, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_int, check_number
from gptfast.ops._registry import register_fake

OP = "sample"


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    position: int | Tensor = 0,
    stream: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(logits / temperature), cut to the top k, then to the nucleus of mass p, then one draw per row.

    The draw is argmax(logits / temperature + g) over the kept tokens with Gumbel noise g (Maddison et al.,
    arXiv 1411.0030), g a Philox function of (seed, position, stream, token): the same numbers give the same token on
    every backend and in every batch. Nucleus: Holtzman et al., arXiv 1904.09751.

    Args:
        logits: (B, V), float32, bfloat16, float16 or float64; -inf excludes a token, +inf makes it certain.
        temperature: finite, >= 0. The largest logit is taken (ties: lowest id) at 0, below 2**-126, and where
            logit / temperature reaches 1e30, beside which the noise is nothing.
        top_k: keep exactly k tokens (ties: lowest ids); 0 keeps all.
        top_p: in (0, 1]; keep the smallest set of largest probabilities with mass >= p, never empty.
        seed: in [0, 2**64).
        position: of the drawn token in its sequence, in [0, 2**32): an int for all rows or (B,) int64 (on a GPU not
            checked).
        stream: which of many independent sequences a row is: an int, (B,) int64, or None for the row number.
        backend: see `gptfast.backend`.
    Returns:
        (B,) int64 token ids.
    Raises:
        TypeError, ValueError: wrong dtype, shape or range.  RuntimeError: a row with nan, or with nothing but -inf.
    """
    check_float(OP, logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{OP}: logits has shape {tuple(logits.shape)}; expected (B, V) with V >= 1")
    check_number(OP, "temperature", temperature)
    check_number(OP, "top_p", top_p)
    check_int(OP, "top_k", top_k, 0, " (0 keeps all tokens)")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{OP}: temperature is {temperature}; expected a finite number >= 0 (0 takes the most likely)")
    if not 0 < top_p <= 1:
        raise ValueError(f"{OP}: top_p is {top_p}; expected 0 < top_p <= 1 (1 keeps all tokens)")
    rng.check_counter(OP, "seed", seed, 64)
    positions = _per_row("position", position, logits)
    if stream is None:
        streams = torch.arange(logits.shape[0], device=logits.device)
    else:
        streams = _per_row("stream", stream, logits)
    temperature, top_p = float(temperature), float(top_p)
    runs_on = resolve(OP, backend, logits)
    if runs_on == "eager":
        return reference.sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=positions, stream=streams
        )
    options = (temperature, top_k, top_p, rng.as_int64(seed))
    return kernels(runs_on).sample(logits.detach(), *options, positions, streams)


def _per_row(name: str, value: int | Tensor, logits: Tensor) -> Tensor:
    if isinstance(value, int):
        rng.check_counter(OP, name, value)
        return torch.full((logits.shape[0],), value, dtype=torch.int64, device=logits.device)
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (logits.shape[0],):
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{OP}: {name} is {got}; expected an int or an int64 tensor of shape ({logits.shape[0]},)")
    # values on a GPU are not checked: that needs a sync
    known = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and ((value < 0) | (value >= 2**32)).any():
        raise ValueError(f"{OP}: {name} has values outside [0, 2**32)")
    return value.to(logits.device)


@register_fake("sample")
def _(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, position: Tensor, stream: Tensor
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
