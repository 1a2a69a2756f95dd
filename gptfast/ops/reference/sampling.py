"""Sampling of tokens in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import rng
from gptfast.backend import has_values
from gptfast.ops._row_options import parameters_of


def kept_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """bool (B, V): the tokens that top-k and then top-p leave: ties go to the lowest id, and one token always stays.

    Weights relative to the largest, in float64, are summed as they are: of ten equal tokens 0.9 keeps nine, where
    normalised probabilities would round.
    """
    B, V = logits.shape
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices  # equal logits stay in id order
    ranked = torch.ones(B, V, dtype=torch.bool, device=logits.device)
    if 0 < top_k < V:
        ranked[:, top_k:] = False
    if top_p < 1:
        ordered = logits.double().gather(-1, order)
        weights = ((ordered - ordered[:, :1]) / temperature).exp().masked_fill(~ranked, 0.0)
        before = weights.cumsum(-1) - weights  # mass of the strictly better ranked
        ranked &= before < top_p * weights.sum(-1, keepdim=True)
        ranked[:, 0] = True
    return torch.zeros_like(ranked).scatter(-1, order, ranked)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    position: Tensor | int = 0,
    stream: Tensor | int | None = None,
) -> Tensor:
    x = logits.float()
    _check_tokens("sample", x)
    most_likely = _first_argmax(x)
    if temperature < 2**-126:
        return most_likely
    rows = torch.arange(x.shape[0], device=x.device)
    position = position if isinstance(position, Tensor) else torch.full_like(rows, position)
    stream = rows if stream is None else stream if isinstance(stream, Tensor) else torch.full_like(rows, stream)
    keep = kept_tokens(x, temperature, top_k, top_p)
    noise = rng.gumbel_noise(x.shape[-1], seed, position, stream)
    drawn = _first_argmax((x / temperature + noise).masked_fill(~keep, float("-inf")))
    noise_is_nothing = (x.amax(-1) / temperature).abs() >= 1e30  # or inf: no finite scores
    return torch.where(noise_is_nothing, most_likely, drawn)


def sample_rows(
    logits: Tensor, options: Tensor, *, position: Tensor | int = 0, stream: Tensor | int | None = None
) -> Tensor:
    """`sample` of each row with the parameters that its row of options holds."""
    rows = torch.arange(logits.shape[0], device=logits.device)
    if not has_values(logits) or not len(rows):
        return rows
    _check_tokens("sample_rows", logits)
    position = position if isinstance(position, Tensor) else torch.full_like(rows, position)
    stream = rows if stream is None else stream if isinstance(stream, Tensor) else torch.full_like(rows, stream)
    each = zip(options.tolist(), logits.split(1), position.split(1), stream.split(1), strict=True)
    return torch.cat([sample(x, **parameters_of(row)._asdict(), position=p, stream=s) for row, x, p, s in each])


def _check_tokens(op: str, logits: Tensor) -> None:
    for r, row in enumerate(logits if has_values(logits) else ()):
        if row.isnan().any():
            raise RuntimeError(f"{op}: logits[{r}] holds nan - look for an overflow in the model")
        if row.isneginf().all():
            raise RuntimeError(f"{op}: logits[{r}] holds nothing but -inf; no token is left to draw")


def _first_argmax(x: Tensor) -> Tensor:
    """argmax over the last dimension, ties to the lowest index (torch leaves ties open)."""
    top = x.amax(-1, keepdim=True)
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == top, index, x.shape[-1]).amin(-1)
