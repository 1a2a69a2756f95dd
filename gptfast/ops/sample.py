"""Draw a token from each row of logits, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import rng
from gptfast.backend import kernels, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_same_device
from gptfast.ops._registry import register_fake
from gptfast.ops._row_options import OP as OP_ROWS
from gptfast.ops._row_options import check_parameters, parameters_of

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
    _check_logits(OP, logits)
    check_parameters(OP, temperature, top_k, top_p, seed)
    positions, streams = _coordinates(OP, logits, position, stream)
    temperature, top_p = float(temperature), float(top_p)
    runs_on = resolve(OP, backend, logits)
    if runs_on == "eager":
        return reference.sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=positions, stream=streams
        )
    options = (temperature, top_k, top_p, rng.as_int64(seed))
    return kernels(runs_on).sample(logits.detach(), *options, positions, streams)


def sample_rows(
    logits: Tensor,
    options: Tensor,
    *,
    position: int | Tensor = 0,
    stream: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`sample` with parameters of its own for each row, which lie in a tensor: a CUDA graph that was captured once draws with
    whatever stands there when it is replayed.

    Args:
        logits, position, stream, backend: as in `sample`.
        options: (B, 4) int64 on the device of the logits; a row is what `row_options` returns. On a GPU the values are not
            checked before the call.
    Returns:
        (B,) int64 token ids, for each row those of `sample` with its parameters. In a graph that is captured -1 takes the
        place of a token where a row holds nan, -2 where it holds nothing but -inf, -3 where its options are out of range.
    Raises:
        TypeError, ValueError: wrong dtype, shape or range.  RuntimeError: a row with nan, with nothing but -inf, or with
        options on a GPU that are out of range.
    """
    _check_logits(OP_ROWS, logits)
    _check_rows(logits, options)
    positions, streams = _coordinates(OP_ROWS, logits, position, stream)
    runs_on = resolve(OP_ROWS, backend, logits)
    if runs_on == "eager":
        return reference.sample_rows(logits, options, position=positions, stream=streams)
    return kernels(runs_on).sample_rows(logits.detach(), options, positions, streams)


def _check_logits(op: str, logits: Tensor) -> None:
    check_float(op, logits=logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}; expected (B, V) with V >= 1")


def _check_rows(logits: Tensor, options: Tensor) -> None:
    expected = (logits.shape[0], 4)
    if not isinstance(options, Tensor) or options.dtype != torch.int64 or tuple(options.shape) != expected:
        got = f"{tuple(options.shape)} {options.dtype}" if isinstance(options, Tensor) else type(options).__name__
        raise TypeError(
            f"{OP_ROWS}: options is {got}; expected an int64 tensor of shape {expected}, rows of row_options"
        )
    check_same_device(OP_ROWS, logits=logits, options=options)
    if options.device.type == "cpu" and not torch.compiler.is_compiling():
        for row in options.tolist():
            parameters_of(row)


def _coordinates(op: str, logits: Tensor, position: int | Tensor, stream: int | Tensor | None) -> tuple[Tensor, Tensor]:
    """Position and stream of each row."""
    positions = _per_row(op, "position", position, logits)
    if stream is None:
        return positions, torch.arange(logits.shape[0], device=logits.device)
    return positions, _per_row(op, "stream", stream, logits)


def _per_row(op: str, name: str, value: int | Tensor, logits: Tensor) -> Tensor:
    if isinstance(value, int):
        rng.check_counter(op, name, value)
        return torch.full((logits.shape[0],), value, dtype=torch.int64, device=logits.device)
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or tuple(value.shape) != (logits.shape[0],):
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} is {got}; expected an int or an int64 tensor of shape ({logits.shape[0]},)")
    # values on a GPU are not checked: that needs a sync
    known = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and ((value < 0) | (value >= 2**32)).any():
        raise ValueError(f"{op}: {name} has values outside [0, 2**32)")
    return value.to(logits.device)


@register_fake("sample")
def _(
    logits: Tensor, temperature: float, top_k: int, top_p: float, seed: int, position: Tensor, stream: Tensor
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@register_fake("sample_rows")
def _(logits: Tensor, options: Tensor, position: Tensor, stream: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
