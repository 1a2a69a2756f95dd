"""The parameters of a model divided among the ranks: torch's FSDP2 (`fully_shard`), with the waits and sums of `Ranks`.

Each rank keeps its rows of every parameter, of the gradient and of the optimizers' state. The parameters of each attention
and of each MLP are gathered together where it runs, in the dtype of the products. Those of the model beside these -
embeddings, LayerNorms, head - stay gathered from the first use in a pass to the last, in float32, as autocast has them: the
products round as in one process.

What `Ranks.sharding` says about the time between:

    forward   parameters are freed after the forward and after the backward of their module, and gathered for both; a
              gradient is summed over the ranks once a step, and is whole on every rank while there are passes to come
    pass      as forward, but gradients are summed after every pass: never whole for long
    step      parameters are gathered once a step, however many passes it has
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gptfast.models import GPT
from gptfast.models.pretrained import on_meta
from gptfast.training.division import division_of, fill, gathered, local
from gptfast.training.ranks import Ranks

if TYPE_CHECKING:  # to import it takes as long as torch
    from torch.distributed.fsdp import FSDPModule


def shard(model: GPT, ranks: Ranks, dtype: torch.dtype, values: Callable[[str], Tensor] | None = None) -> None:
    """Leave this rank its part of every parameter, in place.

    Args:
        model: the same on every rank; on the meta device with `values`.
        ranks: with `sharding`.
        dtype: of the products.
        values: the whole tensor of a parameter, by name; called in the order of named_parameters, and each is dropped once
            its module is divided. None: the model has its values.
    Raises:
        ValueError: the heads, or the units of an MLP, do not divide among the ranks of a share.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # what a block does with the output of its parts is never in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if ranks.tensor > 1:
        from gptfast.training.tensor_parallel import check_shape, divide

        check_shape(model.config, ranks.tensor)
    mesh, policy = ranks.mesh, MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in _filled(model, values):
        if ranks.tensor > 1:
            divide(part, ranks)
        fully_shard(part, mesh=mesh, reshard_after_forward=ranks.sharding != "step", mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for name, module in _sharded(model):
        module.set_gradient_divide_factor(1.0)  # a loss is normalised before its backward pass
        module.set_force_sum_reduction_for_comms(True)
        if ranks.device.type == "cpu":
            module.set_custom_all_gather(cast(Any, _Gather(ranks, f"the parameters of {name}")))
            module.set_custom_reduce_scatter(cast(Any, _ScatterSum(ranks, f"the gradients of {name}")))


def parts_of(model: GPT) -> Iterator[nn.Module]:
    """The modules whose parameters are gathered where they run; the model itself has the rest."""
    for block in model.h:
        yield from (block.get_submodule("attn"), block.get_submodule("mlp"))


def _filled(model: GPT, values: Callable[[str], Tensor] | None) -> Iterator[nn.Module]:
    """The parts of a model, each once it has its values; at the end all of the model has."""
    if values is None:
        yield from parts_of(model)
        return
    last = {next(reversed(list(part.parameters()))): part for part in parts_of(model)}
    for name, p in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(values(name)))
        if p in last:
            yield last[p]
    model.tie_weights()


def plan_pass(model: nn.Module, ranks: Ranks, last: bool) -> None:
    """Prepare a divided model for a pass of a step, as `Ranks.sharding` says. last: of the step."""
    root = cast("FSDPModule", model)
    root.set_requires_gradient_sync(last or ranks.sharding == "pass")
    root.set_reshard_after_backward(last or ranks.sharding != "step")


def free(model: nn.Module) -> None:
    """Free what a forward without a backward has gathered."""
    for _, module in _sharded(model):
        module.reshard()


def put(model: nn.Module, values: Callable[[str], Tensor], ranks: Ranks | None) -> None:
    """Give a model whole tensors, by the names of its parameters; where it is divided, its parts of them."""
    for name, p in model.named_parameters():
        fill(name, p, values(name), ranks)


def whole_copy(model: GPT, ranks: Ranks) -> GPT:
    """The model with whole parameters, on the CPU of rank 0, elsewhere without values. All ranks call it."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        tensor = gathered(name, p, ranks)
        if ranks.is_main:
            found[name] = tensor.cpu()
    copy = on_meta(GPT, model.config)
    copy.load_state_dict(found, strict=False, assign=True)
    copy.tie_weights()
    return copy


def total_norm(gradients: Sequence[Tensor], ranks: Ranks) -> float:
    """The norm of a gradient of which each rank has a part."""
    once = [local(g) for g in gradients if division_of("", g, ranks).is_first]
    own = float(torch.nn.utils.get_total_norm(once))
    return sum(row[0] for row in ranks.exchange([own * own], "the norm of the gradient")) ** 0.5


def _sharded(model: nn.Module) -> Iterator[tuple[str, FSDPModule]]:
    """The modules whose parameters are gathered together, and their names."""
    for name, module in model.named_modules():
        if hasattr(module, "set_requires_gradient_sync"):
            yield name or "the embeddings", cast("FSDPModule", module)


class _OnCpu:
    """A collective of one module's parameters; torch's Comm, which has no public name."""

    def __init__(self, ranks: Ranks, what: str) -> None:
        self.ranks, self.what = ranks, what

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_OnCpu):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        self.ranks.gather(output_tensor, input_tensor, self.what, self.ranks.data_group)


class _ScatterSum(_OnCpu):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        self.ranks.scatter_sum(output_tensor, input_tensor, self.what, self.ranks.data_group)
