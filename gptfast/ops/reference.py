"""Every op in eager PyTorch: oracle of the tests, baseline of the benchmarks, and the fallback without a kernel.

Same arguments as the public functions, any floating dtype including fp64, differentiable by autograd.
Half-precision inputs are computed in fp32 and rounded once at the end; fp32 and fp64 are computed as they are.
Named dimensions: B batch, T queries, S keys, H heads, D head_dim, C channels, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import rng
from gptfast._nf4 import dequantize_groups, nf4_absmax, nf4_values, unpack_pairs
from gptfast._schemas import AttentionOptions
from gptfast.backend import has_values


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _keep_scaled(
    x: Tensor, shape: tuple[int, int, int], p: float, seed: int, offset: int, matrices: bool = False
) -> Tensor:
    """Dropout by the Philox contract; `shape` numbers the elements of x. A nan in a dropped place is dropped.

    matrices: what is above the 32 bits of offset counts matrices, not rows.
    """
    if p == 0:
        return x
    first, number = divmod(offset, 2**32)
    keep = rng.dropout_keep(shape, p, seed, number, x.device, (first, 0) if matrices else (0, first)).view(x.shape)
    return torch.where(keep, x * rng.dropout_scale(p), 0.0)


def _rows(x: Tensor) -> tuple[int, int, int]:
    """(1, rows, C): the shape by which the dropout contract numbers the elements of x."""
    return 1, math.prod(x.shape[:-1]), x.shape[-1]


def visible_keys(T: int, S: int, options: AttentionOptions, device: torch.device | str = "cpu") -> Tensor:
    """bool (B or 1, 1, T, S): may query i see key j?  Causal: j <= i + S - T; window w: also j > i + S - T - w."""
    last = torch.arange(T, device=device)[:, None] + (S - T)
    j = torch.arange(S, device=device)[None, :]
    visible = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    if options.causal:
        visible = visible & (j <= last)
    if options.window:
        visible = visible & (j > last - options.window)
    if (cu_seqlens := options.cu_seqlens) is not None:  # packed documents: query and key must lie in the same one
        document = torch.searchsorted(cu_seqlens.contiguous(), torch.arange(T, device=device), right=True)
        inside = document < len(cu_seqlens)
        visible = visible & (document[:, None] == document[None, :]) & inside[:, None]
    if options.seq_lens is not None:
        visible = visible & (j < options.seq_lens[:, None, None, None])
    if options.left_pad is not None:
        visible = visible & (j >= options.left_pad[:, None, None, None])
    return visible


def _masked_product(equation: str, a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """einsum of `a` with the keys or values x (B, H, S, D) that each query sees, without 0 * nan from the others.

    It needs (B, H, T, S, D) of memory, so it is for inputs with inf or nan only.
    """
    return torch.einsum(equation, a, torch.where(mask[..., None], x[:, :, None], 0.0))


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    left_pad: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    return_lse: bool = False,
    enable_gqa: bool = False,
    first_row: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    offset = rng.at_row("causal_attention", offset, first_row, q.shape[1])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    options = AttentionOptions(seq_lens, cu_seqlens, causal, scale, dropout_p, seed, offset, window or 0)
    options = options._replace(left_pad=left_pad, sinks=sinks, softcap=softcap or 0.0)
    return attention(q, k, v, options, return_lse)


def attention(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_attention, with its options in one object. Queries of heads that share keys lie in one matrix, head after head:
    k and v (B, K, S, D) are not repeated."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    rows = H * T // K if K else T
    mask = visible_keys(T, S, options, q.device)
    qf, kf, vf = _upcast(q).reshape(B, K, rows, D), _upcast(k), _upcast(v)
    leaky = has_values(kf) and not (torch.isfinite(kf).all() and torch.isfinite(vf).all())
    seen = mask.repeat(1, 1, H // K, 1) if leaky else mask  # of the rows of a key head
    scores = _masked_product("bhtd,bhtsd->bhts", qf, kf, seen) if leaky else qf @ kf.transpose(-1, -2)
    scores = scores.reshape(B, H, T, S) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))  # B H T S
    if options.sinks is not None:  # as the score of one more key, whose value is 0
        column = options.sinks.to(scores.dtype)[None, :, None, None].expand(B, H, T, 1)
        scores = torch.cat([scores, column], -1)
    empty = scores.isneginf().all(-1, keepdim=True)  # B H T 1: no key is visible
    probs = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., :S]
    probs = _keep_scaled(probs, (B * H, T, S), options.dropout_p, options.seed, options.offset, True)
    probs = probs.reshape(B, K, rows, S)
    out = (_masked_product("bhts,bhtsd->bhtd", probs, vf, seen) if leaky else probs @ vf).reshape(B, H, T, D)
    return (out.to(q.dtype), scores.detach().logsumexp(-1)) if return_lse else out.to(q.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    xf = _upcast(x)
    mean = xf.mean(-1, keepdim=True)
    var = (xf - mean).square().mean(-1, keepdim=True)
    y = (xf - mean) * torch.rsqrt(var + eps) * weight.to(xf.dtype)
    return (y if bias is None else y + bias.to(xf.dtype)).to(out_dtype or x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    first_row: int = 0,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    offset = rng.at_row("add_layer_norm", offset, first_row, math.prod(x.shape[1:-1]))
    dropped = _keep_scaled(_upcast(x), _rows(x), dropout_p, seed, offset)
    total = (dropped + _upcast(residual)).to(torch.promote_types(x.dtype, residual.dtype))
    return layer_norm(total, weight, bias, eps, out_dtype=out_dtype), total


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    xf = _upcast(x) if bias is None else _upcast(x) + bias.to(_upcast(x).dtype)
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (xf + 0.044715 * xf**3)
        return (0.5 * xf * (1 + torch.tanh(inner))).to(x.dtype)
    return (0.5 * xf * (1 + torch.erf(xf * math.sqrt(0.5)))).to(x.dtype)


def dropout(x: Tensor, p: float, seed: int = 0, offset: int = 0, first_row: int = 0) -> Tensor:
    offset = rng.at_row("dropout", offset, first_row, math.prod(x.shape[1:-1]))
    return _keep_scaled(_upcast(x), _rows(x), p, seed, offset).to(x.dtype)


def embedding(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    x = F.embedding(ids, wte)  # B T C
    if wpe is None:
        return x
    if positions is None:
        positions = torch.arange(ids.shape[-1], device=ids.device)
    return (x + F.embedding(positions, wpe)).to(wte.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation is None or activation in ACTIVATIONS:
        return y if activation is None else ACTIVATIONS[activation](y)
    return gelu(y, None, "tanh" if activation == "gelu_tanh" else "none")


def _quick_gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel, arXiv 1606.08415, section 2: the sigmoid in place of Phi."""
    return x * torch.sigmoid(1.702 * x)


# beside GELU, by their names in `linear` and `GPTConfig`
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "quick_gelu": _quick_gelu, "tanh": torch.tanh}


def dequantize_nf4(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    shape: tuple[int, ...],
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    n = math.prod(shape)
    values = nf4_values(codes.device)[unpack_pairs(codes.flatten())[:n].long()]
    scales = nf4_absmax(absmax, nested_absmax, offset).repeat_interleave(block_size)[:n]
    return (values * scales).to(dtype).view(shape)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    format: str = "int8",
    group_size: int = 32,
) -> Tensor:
    xf = _upcast(x)
    weight = dequantize_groups(codes, scales, format, group_size)[:, : x.shape[-1]].to(xf.dtype)  # N K
    y = F.linear(xf, weight)
    return (y if bias is None else y + bias.to(xf.dtype)).to(x.dtype)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    logprobs = _upcast(logits).log_softmax(-1)  # N V
    valid = targets != ignore_index
    picked = logprobs.gather(-1, targets.clamp(0, logprobs.shape[-1] - 1)[..., None])[..., 0]
    loss = -picked * (1 - label_smoothing)
    if label_smoothing:
        loss = loss - label_smoothing * logprobs.mean(-1)
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    return cross_entropy(
        F.linear(hidden, weight),
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


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
    for r in range(x.shape[0] if has_values(x) else 0):
        if x[r].isnan().any():
            raise RuntimeError(f"sample: logits[{r}] holds nan - look for an overflow in the model")
        if x[r].isneginf().all():
            raise RuntimeError(f"sample: logits[{r}] holds nothing but -inf; no token is left to draw")
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


def _first_argmax(x: Tensor) -> Tensor:
    """argmax over the last dimension, ties to the lowest index (torch leaves ties open)."""
    top = x.amax(-1, keepdim=True)
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == top, index, x.shape[-1]).amin(-1)
