"""Mixture of experts: which experts a token goes to, the loss that spreads tokens over them, and their MLPs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_choice
from gptfast.backend import is_many, resolve
from gptfast.ops._checks import check_float, check_int, check_same_device
from gptfast.ops._tensors import autocast
from gptfast.ops.grouped_linear import grouped_linear, products_of_groups
from gptfast.ops.reference._numbers import upcast
from gptfast.ops.swiglu import LAYOUTS, swiglu

OP = "moe"


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights: softmax over the k largest logits.

    That is the softmax over all experts, cut to k and divided by its sum (Shazeer et al., arXiv 1701.06538; Mixtral and
    gpt-oss). Of equal logits the expert of the lower number comes first, on every device.

    Args:
        logits: (N, E), of the router, any float dtype; the softmax is computed in fp32 at least.
        k: experts of a token, 1 <= k <= E.
    Returns:
        (experts, weights): (N, k) int64, largest logit first, and (N, k) of logits' dtype, which sum to 1; the gradient goes to
        the chosen logits.
    Raises:
        TypeError, ValueError: wrong dtype, shape or k.
    """
    check_float("route", logits=logits)
    check_int("route", "k", k, 1)
    if logits.dim() != 2 or k > logits.shape[1]:
        raise ValueError(
            f"route: logits has shape {tuple(logits.shape)} and k is {k}; expected logits (N, E) and k <= E, the number of "
            "experts"
        )
    experts = logits.detach().sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()
    chosen = logits.gather(1, experts)
    return experts, upcast(chosen).softmax(1).to(logits.dtype)


def load_balance_loss(
    logits: Tensor, experts: Tensor, mask: Tensor | None = None, *, sent: Tensor | None = None
) -> Tensor:
    """E times the sum over experts of (share of tokens that go there) x (mean probability of the router), a scalar.

    It is k where tokens are spread evenly and up to E k where all go to the same expert; added to the loss with a factor such as 0.01
    it keeps experts in use (Fedus et al., arXiv 2101.03961, equation 4; the same number as transformers'
    `load_balancing_loss_func`). Only the probabilities have a gradient.

    Args:
        logits: (N, E), of the router; those of several layers one after another count together.
        experts: (N, k), from `route`.
        mask: (N,) of bool or numbers, 0 for tokens that do not count, as padding; None: all count.
        sent: (E,), the share of tokens that go to each expert, where it is that of more tokens than these, such as those of
            other processes: the mean of their losses, weighted by their tokens, is then the loss of all; None: of these tokens.
    Raises:
        TypeError, ValueError: wrong dtype or shape.
    """
    op = "load_balance_loss"
    check_float(op, logits=logits)
    check_same_device(op, logits=logits, experts=experts, mask=mask)
    if logits.dim() != 2 or experts.dim() != 2 or len(experts) != len(logits):
        raise ValueError(
            f"{op}: logits has shape {tuple(logits.shape)} and experts {tuple(experts.shape)}; expected (N, E) and (N, k)"
        )
    if mask is not None and mask.shape != logits.shape[:1]:
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}; expected ({len(logits)},), one number a token")
    E = logits.shape[1]
    if sent is not None and sent.shape != (E,):
        raise ValueError(f"{op}: sent has shape {tuple(sent.shape)}; expected ({E},), one share an expert")
    probabilities = upcast(logits).softmax(1)
    counts = probabilities.new_ones(len(logits)) if mask is None else mask.to(probabilities.dtype)
    total = counts.sum().clamp(min=1)
    if sent is None:
        sent = probabilities.new_zeros(E).index_add(0, experts.flatten(), counts.repeat_interleave(experts.shape[1]))
        sent = sent / total
    return E * (sent.to(probabilities.dtype) * (probabilities * counts[:, None]).sum(0) / total).sum()


def moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    alpha: float | None = None,
    limit: float | None = None,
    layout: str = "halves",
    backend: str | None = None,
) -> Tensor:
    """The sum over a token's experts of weight x (down swiglu(gate_up x + b) + c): the MLP of a mixture of experts.

    Tokens are sorted by expert (a stable counting order), each expert's rows go through one product, and the results are added
    a token at a time in the order of its experts, in fp32. No token is dropped, and no result depends on the order in which threads
    end: the same call gives the same bits. Experts without tokens cost nothing.

    Args:
        x: (N, C), any float dtype.
        experts: (N, k) int64 or int32 in [0, E), those of a token different, see `route`.
        weights: (N, k), of any float dtype.
        gate_up: (E, 2 F, C), and down: (E, C, F). The transposes of (E, C, 2 F) and (E, F, C), as gpt-oss has them, cost no copy.
        gate_up_bias: (E, 2 F) or None, and down_bias: (E, C) or None.
        alpha, limit: of `swiglu`: None, None is SwiGLU, 1.702, 7.0 that of gpt-oss.
        layout: of the 2 F columns: "halves" (gate, then up) or "interleaved" (gate in the even ones, as gpt-oss).
        backend: see `gptfast.backend`.
    Returns:
        (N, C), of x's dtype (under autocast of its dtype).
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, layout, or an expert that does not exist.
    """
    _check(x, experts, weights, gate_up, down, gate_up_bias, down_bias, layout)
    E, k = len(gate_up), experts.shape[1]
    x = autocast(x)[0]
    numbers, order = experts.flatten().sort(stable=True)
    offsets = torch.searchsorted(numbers, torch.arange(E + 1, dtype=numbers.dtype, device=numbers.device))
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    recorded = torch.is_grad_enabled()  # else a token's call is shorter, and more so where nothing is left to check
    plain = not recorded and _is_plain(x, (gate_up, down, gate_up_bias, down_bias), backend)
    rows = _Spread.apply(x, order, places, k) if recorded else x[order // k]
    multiply = products_of_groups if plain else partial(grouped_linear, backend=backend)
    hidden = multiply(rows, offsets, gate_up, gate_up_bias)
    hidden = swiglu(hidden, alpha=alpha, limit=limit, layout=layout, backend=backend)
    y = multiply(hidden, offsets, down, down_bias)
    own = upcast((_Collect.apply(y, order, places) if recorded else y[places]).view(*experts.shape, y.shape[1]))
    return (own * weights[..., None].to(own.dtype)).sum(1).to(y.dtype)


def _is_plain(x: Tensor, others: tuple[Tensor | None, ...], backend: str | None) -> bool:
    """Whether our CPU kernels multiply these tensors as they are, without a graph, a transform or another dtype."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not is_many(x)
        and all(t is None or t.dtype == x.dtype for t in others)
        and resolve("grouped_linear", backend, x) == "cpu"
    )


def _check(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: str,
) -> None:
    biases = {n: b for n, b in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)) if b is not None}
    check_float(OP, x=x, weights=weights, gate_up=gate_up, down=down, **biases)
    check_same_device(OP, x=x, experts=experts, weights=weights, gate_up=gate_up, down=down, **biases)
    check_choice(OP, "layout", layout, LAYOUTS)
    if experts.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{OP}: experts has dtype {experts.dtype}; expected int64 or int32")
    if x.dim() != 2 or experts.dim() != 2 or len(experts) != len(x) or experts.shape != weights.shape:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)}, experts {tuple(experts.shape)} and weights {tuple(weights.shape)}; "
            "expected (N, C), (N, k) and (N, k)"
        )
    E, C, F = len(gate_up), x.shape[1], down.shape[-1]
    wanted = {"gate_up": (E, 2 * F, C), "down": (E, C, F), "gate_up_bias": (E, 2 * F), "down_bias": (E, C)}
    for name, tensor in {"gate_up": gate_up, "down": down, **biases}.items():
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"{OP}: {name} has shape {tuple(tensor.shape)}; expected {wanted[name]} with x {tuple(x.shape)}, "
                f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)}: (E, 2 F, C) and (E, C, F)"
            )
    if experts.device.type == "cpu" and experts.numel() and not torch.compiler.is_compiling():
        low, high = (int(n) for n in experts.aminmax())
        if low < 0 or high >= E:
            raise ValueError(f"{OP}: experts holds {low if low < 0 else high}; expected numbers from 0 to {E - 1}")


class _Spread(torch.autograd.Function):
    """A token's row once for each of its experts, in their order: (N, C) -> (N k, C). Gradients of a token are added in the order
    of its experts, where indexing's own backward adds in any order on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (drows,), (places,) = grads, ctx.saved_tensors
        return upcast(drows[places].view(-1, ctx.k, drows.shape[1])).sum(1).to(drows.dtype), None, None, None


class _Collect(torch.autograd.Function):
    """Rows in the order of experts, put back into the order of tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[places]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (order,) = grads, ctx.saved_tensors
        return dy[order], None, None
