"""The inside of a GPT or BERT on a prompt: attention weights, the logit lens, neighbours of embeddings, the next token.

L layers, H heads, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptfast._checks import check_count
from gptfast.ops.reference import kept_tokens

ROWS = 256  # queries whose weights are computed at a time


class Inside(NamedTuple):
    """The inside of a GPT or BERT on a prompt.

    attention: (L, H, T, T) float32, 0 where a query may not look. lens: (L + 1, T) ids and log-probabilities of the token that
    each position would predict from the embedding, and after each block, by the final LayerNorm and the head.
    """

    attention: np.ndarray
    lens_ids: np.ndarray
    lens_logprobs: np.ndarray


@torch.inference_mode()
def look_inside(model: Any, ids: Sequence[int]) -> Inside:
    """Attention weights and the logit lens of a GPT on a prompt, or of a BERT, with [CLS] and [SEP] where ids have them.

    Our kernels never hold the weights of attention; here they are computed from queries and keys, `ROWS` queries at a time.

    Raises:
        TypeError: not a GPT.  ValueError: no ids, too many, or outside the vocabulary.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "h"):
        raise TypeError(
            f"look_inside: model is a {type(model).__name__}; expected a GPT or BERT, which has blocks to look into"
        )
    weights: list[Tensor] = []
    streams: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with _watching(model, weights.append, streams.append):
            model(torch.tensor([list(ids)], device=next(model.parameters()).device))
    finally:
        model.train(was_training)
    found = [_head(model, stream) for stream in streams]
    return Inside(
        torch.stack(weights).cpu().numpy(),
        np.stack([ids.cpu().numpy() for ids, _ in found]),
        np.stack([logprobs.cpu().numpy() for _, logprobs in found]),
    )


@contextmanager
def _watching(model: Any, weights: Callable[[Tensor], None], streams: Callable[[Tensor], None]) -> Iterator[None]:
    """Hooks that collect each layer's attention weights, and the stream before the first block and after each one."""
    hooks = []
    for layer, block in enumerate(model.h):
        attn = block.attn
        hooks.append(attn.c_attn.register_forward_hook(lambda _, __, qkv, attn=attn: weights(_weights(qkv, attn))))
        if layer == 0:
            hooks.append(block.register_forward_pre_hook(lambda _, inputs: streams(_sum(inputs[0], inputs[1])[0])))
        hooks.append(block.register_forward_hook(lambda _, __, out: streams(_sum(*out)[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sum(branch: Tensor | None, residual: Tensor) -> Tensor:
    return residual if branch is None else residual + branch


def _weights(qkv: Tensor, attn: Any) -> Tensor:
    """(H, T, T) from (1, T, (H + 2 K) D). With sinks a row adds up to less than 1."""
    q, k, _ = (x[0].float() for x in attn.queries_keys_values(qkv))
    H, T, _ = q.shape
    k = k.repeat_interleave(H // len(k), 0)
    found = q.new_empty(H, T, T)
    keys = torch.arange(T, device=q.device)
    for start in range(0, T, ROWS):
        queries = keys[start : start + ROWS, None]
        hidden = (keys > queries) & attn.causal
        if attn.window is not None:
            hidden |= keys <= queries - attn.window
        scores = q[:, start : start + ROWS] @ k.transpose(1, 2) * attn.head_dim**-0.5
        scores = scores if attn.softcap is None else attn.softcap * torch.tanh(scores / attn.softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        if attn.sinks is not None:
            scores = torch.cat((scores, attn.sinks.float()[:, None, None].expand(H, len(queries), 1)), -1)
        found[:, start : start + ROWS] = scores.softmax(-1)[..., :T]
    return found


def _head(model: Any, stream: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token at each position and its log-probability, (T,) each."""
    x = stream if model.ln_f is None else model.ln_f(stream)
    logprobs, ids = model.logits_of(x).float().log_softmax(-1).max(-1)
    return ids, logprobs


def distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The probabilities of the next token from which `gptfast.ops.sample` draws: (V,) from logits (V,).

    Raises:
        ValueError: temperature is not above 0, or top_k or top_p is out of range.
    """
    if not temperature > 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"distribution: temperature {temperature}, top_k {top_k}, top_p {top_p}; expected a temperature above 0, top_k of at "
            "least 0 (0: all tokens) and top_p in (0, 1]"
        )
    kept = kept_tokens(logits.float()[None], temperature, top_k, top_p)[0]
    return (logits.float() / temperature).masked_fill(~kept, -torch.inf).softmax(-1)


@torch.inference_mode()
def nearest(model: Any, vector: Tensor, k: int = 5, exclude: Sequence[int] = ()) -> list[tuple[int, float]]:
    """The tokens whose embeddings point most nearly where a vector does: (id, cosine), the nearest first.

    Args:
        vector: (C,), such as model.wte.weight[id].
        exclude: ids to leave out.
    """
    table = model.wte.weight.float()
    check_count("nearest", "k", k, 1, len(table) - len(set(exclude)))
    cosines = torch.nn.functional.cosine_similarity(table, vector.float()[None])
    cosines[list(exclude)] = -torch.inf
    values, ids = cosines.topk(k)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def analogy(model: Any, a: int, b: int, c: int, k: int = 5) -> list[tuple[int, float]]:
    """a - b + c among the embeddings of tokens, such as king - man + woman (Mikolov et al., 2013); the three are left out."""
    w = model.wte.weight
    return nearest(model, w[a] - w[b] + w[c], k, exclude=(a, b, c))
