"""Attention and MLP divided among ranks that see the same rows: tensor parallelism (Shoeybi et al., Megatron-LM, arXiv
1909.08053, section 3).

Each of N ranks has n_head / N heads of every attention and inner_dim / N units of every MLP: of the first matrix the rows that
make them, of the second the columns that take them. What the second gives is summed over the ranks, and so is the gradient of
what enters the first: two sums a block in the forward and two in the backward pass. Parameters are torch's DTensors
(`parallelize_module`), the ops run on the local part of each, and the sums are those of `Ranks`.

The rows of c_attn are those of all queries, then keys, then values. Here they are in the order of the ranks, each with the
queries, keys and values of its heads; `gptfast.training.division` knows the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.nn.attention import CausalSelfAttention
from gptfast.nn.linear import Linear
from gptfast.training.division import local
from gptfast.training.ranks import Ranks


def check_shape(config: GPTConfig, tensor: int) -> None:
    """Refuse a model whose heads, or units of an MLP, do not divide among `tensor` ranks.

    Raises:
        ValueError: it names both numbers; or what heads or units have beside those of a GPT-3, which no rank has a part of.
    """
    undivided = {
        "n_expert": config.n_expert is not None,
        "n_kv_head": config.kv_heads != config.n_head,
        "qk_norm": config.qk_norm and config.norm_affine,
        "attention_sinks": config.attention_sinks,
        "activation": config.activation == "swiglu",
    }
    for name, found in undivided.items():
        if found:
            raise ValueError(
                f"train: `tensor_parallel` does not divide a model with {name}={getattr(config, name)!r}; train it with "
                "`parallel` fsdp alone"
            )
    for what, count in (("heads (n_head)", config.n_head), ("units of an MLP", config.inner_dim)):
        if count % tensor:
            raise ValueError(
                f"train: `tensor_parallel` is {tensor} but the model has {count} {what}; expected a number that divides them"
            )


def divide(part: nn.Module, ranks: Ranks) -> None:
    """Leave this rank its part of an attention or an MLP, in place.

    Args:
        part: with whole parameters, the same on every rank.
        ranks: with `tensor` > 1.
    """
    first, second = _First(ranks), _Second(ranks)
    if isinstance(part, CausalSelfAttention):
        _order_by_heads(part.c_attn, ranks.tensor)
        plan: dict[str, Any] = {"c_attn": first, "c_proj": second}
        part.n_head //= ranks.tensor
        part.__class__ = DividedAttention
        part.place = ranks.rank % ranks.tensor, ranks.tensor  # pyright: ignore[reportArgumentType]
    else:
        plan = {"c_fc": first, "c_proj": second}
    parallelize_module(part, ranks.tensor_mesh, plan, src_data_rank=None)  # None: nothing is sent


def _order_by_heads(c_attn: nn.Linear, tensor: int) -> None:
    for name, p in list(c_attn.named_parameters()):
        rows = p.detach().unflatten(0, (3, tensor, -1)).transpose(0, 1).flatten(0, 2)
        setattr(c_attn, name, nn.Parameter(rows))


class DividedAttention(CausalSelfAttention):
    """Some of the heads. place: which part of them, of how many."""

    place: tuple[int, int]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first_row: int = 0, **options: Any) -> Tensor:
        """With dropout a row at a time: its mask begins at the number of this row's first head here."""
        if not options["dropout_p"]:
            return super().attend(q, k, v, **options)
        (number, count), attend = self.place, super().attend
        rows = enumerate(zip(q.split(1), k.split(1), v.split(1), strict=True), first_row)
        return torch.cat([attend(*row, first_row=n * count + number, **options) for n, row in rows])


class _First(ColwiseParallel):
    """Rows of the matrix, and of the bias."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return _divided(module, device_mesh, self, FirstLinear)


class _Second(RowwiseParallel):
    """Columns of the matrix, and the whole bias."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return _divided(module, device_mesh, self, SecondLinear)


def _divided(module: nn.Module, mesh: Any, style: _First | _Second, kind: type[nn.Module]) -> nn.Module:
    distribute_module(module, mesh, style._partition_linear_fn)
    module.__class__ = kind
    module.ranks = style.ranks  # pyright: ignore[reportArgumentType]
    return module


class FirstLinear(Linear):
    """Some of the rows of a linear layer, and its activation: (..., in_features) -> (..., out_features / N)."""

    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:
        x = _SumOfGradients.apply(input, self.ranks)
        return ops.linear(x, local(self.weight), self.bias if self.bias is None else local(self.bias), self.activation)


class SecondLinear(Linear):
    """Some of the columns of a linear layer: (..., in_features / N) -> (..., out_features), the same on all ranks."""

    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:
        y = _Sum.apply(ops.linear(input, local(self.weight)), self.ranks)
        return y if self.bias is None else y + local(self.bias).to(y.dtype)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return _summed(x, ranks)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy, None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(dy, ctx.ranks), None


def _summed(x: Tensor, ranks: Ranks) -> Tensor:
    """A new tensor, the sum over the ranks that divide a module."""
    flat = x.clone().flatten() if x.is_cuda else x.reshape(-1)
    return ranks.total(flat, "a sum of tensor parallelism", ranks.tensor_group).view_as(x)
