"""What a run would need on many GPUs: the model is divided among as many ranks that do not exist, and counted.

    python -m gptfast.training.simulate --preset gpt3-175b --ranks 1024
    python -m gptfast.training.simulate --preset gpt3-13b --ranks 8 64 --reshard step --recompute
    python -m gptfast.training.simulate --preset gpt3-175b --ranks 1024 --tensor-parallel 8

The model has shapes and no values (torch's meta device), the ranks are torch's fake process group. Its division is that of
`gptfast train --parallel fsdp --tensor-parallel N`. Activations are measured on a narrow model of the same head size and scaled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptfast.config import GPTConfig
from gptfast.models import BERT, GPT
from gptfast.training.division import is_divided, local
from gptfast.training.options import SHARDING
from gptfast.training.ranks import Ranks
from gptfast.training.sharding import parts_of, shard
from gptfast.training.tensor_parallel import divide

_MOMENTS = 2  # of AdamW, float32 as weights and gradients are


@dataclass(frozen=True)
class Needs:
    """What one rank needs, in bytes. Traffic is what it sends in a step; it receives as much.

    parameters: how many the whole model has. weights, gradients, optimizer: the rank's parts. gathered: parameters of others
    and gradients before they are summed, at most at one time. activations: kept for the backward pass of one pass.
    parameter_traffic, gradient_traffic, tensor_traffic: of a step; the last are the sums of tensor parallelism.
    flops: of a step, of one rank.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    parameter_traffic: int
    gradient_traffic: int
    tensor_traffic: int
    flops: float

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations

    @property
    def traffic(self) -> int:
        return self.parameter_traffic + self.gradient_traffic + self.tensor_traffic


def needs(
    config: GPTConfig,
    ranks: int,
    rows: int = 1,
    passes: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    reshard: str = "forward",
    recompute: bool = False,
    tensor: int = 1,
) -> Needs:
    """What `gptfast train --parallel fsdp` needs.

    Args:
        config: of the model. ranks: how many, at least 2.
        rows: of one pass on one rank, or on the `tensor` ranks that see the same; of block_size tokens. passes: of a step.
        dtype: of the products. reshard, recompute, tensor: as the options of `gptfast train`.
    Raises:
        ValueError: `tensor` does not divide the ranks, or the model.
    """
    with _fake_ranks(ranks, tensor) as group:
        group.sharding = reshard
        group.connect()
        with torch.device("meta"):
            model = GPT(config)
        shard(model, group, dtype)
        whole = [_of_a_share(part.parameters(), tensor) for part in parts_of(model)]
        everything = _of_a_share(model.parameters(), tensor)
        own = sum(local(p).numel() for p in model.parameters())
    total, parts = model.num_parameters(), sum(whole)  # parts: what attentions and MLPs gather
    root, largest, size = everything - parts, max(whole), dtype.itemsize  # root: what stays gathered, in float32
    held = parts * size if reshard == "step" else 2 * largest * size  # the next one is gathered meanwhile
    unsummed = parts * 4 if passes > 1 and reshard != "pass" else largest * (size + 4)
    share, sums = 1 - tensor / ranks, passes if reshard == "pass" else 1
    gathers = 1 if reshard == "step" else 2 * passes
    residual = rows * config.block_size * config.n_embd * size
    tokens = rows * passes * config.block_size * (4 / 3 if recompute else 1)
    head = 6 * config.n_embd * config.vocab_size  # FLOP of a token; all ranks of a share compute it
    return Needs(
        parameters=total,
        weights=4 * own,
        gradients=4 * own,
        optimizer=_MOMENTS * 4 * own,
        gathered=2 * 4 * root + held + unsummed,  # the root's gradient is whole until the end of the backward pass
        activations=activations(config, rows, dtype, recompute, tensor),
        parameter_traffic=round(share * (gathers * parts * size + (1 if reshard == "step" else passes) * root * 4)),
        gradient_traffic=round(share * sums * everything * 4),
        tensor_traffic=round(2 * (1 - 1 / tensor) * residual * passes * config.n_layer * sums_of_a_block(recompute)),
        flops=(head + (model.flops_per_token(config.block_size) - head) / tensor) * tokens,
    )


def sums_of_a_block(recompute: bool) -> int:
    """How often tensor parallelism sums what a block gives or its gradient: for attention and MLP, forward and backward; what is
    computed again ends before the MLP's sum."""
    return 5 if recompute else 4


def _of_a_share(parameters: Iterable[nn.Parameter], tensor: int) -> int:
    """How many elements of these parameters a rank has once they are gathered: its share of what tensor parallelism divides."""
    return sum(p.numel() // (tensor if is_divided(p) else 1) for p in parameters)


def _with_all_heads(config: GPTConfig) -> GPTConfig:
    """A config of any number of layers and heads that keeps about as much: a key for each query, and the pattern of GPT-3."""
    changes: dict[str, Any] = {"n_kv_head": None, "head_size": None}
    if config.attention_pattern not in ("dense", "alternating"):
        changes["attention_pattern"] = "alternating"
    return config.replace(n_embd=config.attn_dim, **changes)


def activations(config: GPTConfig, rows: int, dtype: torch.dtype, recompute: bool, tensor: int = 1) -> int:
    """Bytes that are kept between the forward and the backward pass of `rows` rows."""
    heads = max(2, tensor)
    config = _with_all_heads(config)
    narrow, length = heads * config.head_dim, min(128, config.block_size)
    inner = config.inner_dim * narrow // config.n_embd
    shape = config.replace(n_embd=narrow, n_head=heads, n_inner=inner, vocab_size=64, block_size=length)
    one, two = (_kept(shape.replace(n_layer=n), dtype, recompute, tensor) for n in (1, 2))
    each = two - one
    inside = 0.0  # of the block that is computed again
    if recompute:
        one_plain, two_plain = (_kept(shape.replace(n_layer=n), dtype, False, tensor) for n in (1, 2))
        inside = two_plain - one_plain
    numbers = rows * config.block_size * config.n_embd
    return round(numbers * (one - each + each * config.n_layer + inside))


def _kept(config: GPTConfig, dtype: torch.dtype, recompute: bool, tensor: int) -> float:
    """Bytes that a small model keeps for its backward pass, for each element of the residual stream (B, T, C)."""
    if tensor == 1:
        return _kept_by(GPT(config) if config.causal else BERT(config), dtype, recompute)
    with _fake_ranks(tensor, tensor) as ranks:
        model = GPT(config)
        for part in parts_of(model):
            divide(part, ranks)
        return _kept_by(model, dtype, recompute)


def _kept_by(model: GPT | BERT, dtype: torch.dtype, recompute: bool) -> float:
    """As `_kept`, of a model: what autograd saves in a forward, each storage once, without the weights."""
    storages: dict[int, Tensor] = {}
    model.train().recompute = recompute
    weights = {local(p).untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.numel() and x.untyped_storage().data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.zeros((2, model.config.block_size), dtype=torch.int64)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, ids)[1] if isinstance(model, GPT) else model.masked_loss(model.hidden_states(ids), ids)
    del loss
    return sum(x.untyped_storage().nbytes() for x in storages.values()) / (ids.numel() * model.config.n_embd)


class _First(Ranks):
    """The first of ranks that do not exist: nothing comes from the others."""

    _meeting: Any = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def _wait(self, start: Callable[[], Any], what: str) -> None:
        pass


@contextmanager
def _fake_ranks(size: int, tensor: int) -> Iterator[Ranks]:
    """A group of `size` processes of which this one is the first and the others do not exist."""
    import torch.testing._internal.distributed.fake_pg as fake_pg  # registers the backend "fake"

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=size)
    try:
        yield _First(0, size, None, None, torch.device("cpu"), 1.0, "forward", tensor)
    finally:
        dist.destroy_process_group()


def _report(name: str, ranks: int, given: argparse.Namespace) -> str:
    found = needs(
        GPTConfig.preset(name),
        ranks,
        given.rows,
        given.passes,
        getattr(torch, given.dtype),
        given.reshard,
        given.recompute,
        given.tensor_parallel,
    )
    computing = found.flops / (given.tflops * 1e12)
    sending = found.traffic / (given.gigabytes * 1e9)
    layer = f", {given.tensor_parallel} to a layer" if given.tensor_parallel > 1 else ""
    lines = [
        f"{name}: {found.parameters / 1e9:.2f} billion parameters on {ranks} ranks{layer}",
        "memory of a rank, GB",
        *(
            f"  {what:<38}{value / 1e9:10.2f}"
            for what, value in (
                ("weights, float32, its part", found.weights),
                ("gradient, float32, its part", found.gradients),
                ("AdamW's moments, float32, its part", found.optimizer),
                ("gathered parameters, gradients unsummed", found.gathered),
                (f"activations of {given.rows} rows", found.activations),
                ("sum", found.memory),
            )
        ),
        f"a step of {given.passes} passes",
        f"  sent by a rank, GB: parameters {found.parameter_traffic / 1e9:.2f}, gradients {found.gradient_traffic / 1e9:.2f}"
        + (f", sums of tensor parallelism {found.tensor_traffic / 1e9:.2f}" if given.tensor_parallel > 1 else ""),
        f"  {found.flops:.3g} FLOP of a rank: {computing:.3g} s at {given.tflops:g} TFLOP/s",
        f"  sending {found.traffic / 1e9:.2f} GB: {sending:.3g} s at {given.gigabytes:g} GB/s",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptfast.training.simulate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--preset", default="gpt3-175b", help="a shape of gptfast info; default gpt3-175b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024], help="numbers of GPUs; default 1024")
    parser.add_argument(
        "--rows",
        type=int,
        default=1,
        help="rows of block_size tokens in a pass, of a rank or of those of a layer; default 1",
    )
    parser.add_argument("--passes", type=int, default=1, help="passes of a step (--grad-accum); default 1")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    parser.add_argument("--reshard", choices=SHARDING, default="forward", help="as in gptfast train; default forward")
    parser.add_argument("--recompute", action="store_true", help="as in gptfast train")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="as in gptfast train; default 1")
    parser.add_argument("--tflops", type=float, default=400.0, help="what a GPU reaches, 10^12 FLOP/s; default 400")
    parser.add_argument("--gigabytes", type=float, default=50.0, help="what a GPU sends a second, GB; default 50")
    given = parser.parse_args(arguments)
    if given.tensor_parallel < 1:
        parser.error(f"--tensor-parallel {given.tensor_parallel}: expected at least 1")
    for size in given.ranks:
        if size < 2:
            parser.error(f"--ranks {size}: expected at least 2")
        try:
            print(_report(given.preset, size, given))
        except ValueError as error:
            parser.error(str(error).replace("`tensor_parallel`", "--tensor-parallel").removeprefix("train: "))


if __name__ == "__main__":
    main()
