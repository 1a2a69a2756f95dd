"""What a run would need on many GPUs: the model is divided among as many ranks that do not exist, and counted.

    python -m gptfast.training.simulate --preset gpt3-175b --ranks 1024
    python -m gptfast.training.simulate --preset gpt3-13b --ranks 8 64 --reshard step --recompute

The model has shapes and no values (torch's meta device), the ranks are torch's fake process group. Its division is that of
`gptfast train --parallel fsdp`. Activations are measured on a narrow model of the same head size and scaled.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.models import GPT
from gptfast.training.options import SHARDING
from gptfast.training.ranks import Ranks
from gptfast.training.sharding import local, parts_of, shard

_MOMENTS = 2  # of AdamW, float32 as weights and gradients are


@dataclass(frozen=True)
class Needs:
    """What one rank needs; bytes, of a step those that it sends, which are as many as it gets.

    parameters: of the whole model, a number. weights, gradients, optimizer: the rank's parts. gathered: parameters of others
    and gradients before they are summed, at most at one time. activations: kept for the backward pass of one pass.
    parameter_traffic, gradient_traffic: of a step.
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
    flops: float

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations

    @property
    def traffic(self) -> int:
        return self.parameter_traffic + self.gradient_traffic


def needs(
    config: GPTConfig,
    ranks: int,
    rows: int = 1,
    passes: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    reshard: str = "forward",
    recompute: bool = False,
) -> Needs:
    """What `gptfast train --parallel fsdp` needs.

    Args:
        config: of the model. ranks: how many, at least 2.
        rows: of one pass on one rank, of block_size tokens. passes: of a step.
        dtype: of the products. reshard, recompute: as the options of `gptfast train`.
    """
    with _fake_ranks(ranks) as group:
        group.sharding = reshard
        with torch.device("meta"):
            model = GPT(config)
        whole = [sum(p.numel() for p in part.parameters()) for part in parts_of(model)]
        shard(model, group, dtype)
        own = sum(local(p).numel() for p in model.parameters())
    total, parts = model.num_parameters(), sum(whole)
    root, largest, size = total - parts, max(whole), dtype.itemsize
    held = parts * size if reshard == "step" else 2 * largest * size  # the next one is gathered meanwhile
    unsummed = parts * 4 if passes > 1 and reshard != "pass" else largest * (size + 4)
    share, sums = (ranks - 1) / ranks, passes if reshard == "pass" else 1
    gathers = 1 if reshard == "step" else 2 * passes
    return Needs(
        parameters=total,
        weights=4 * own,
        gradients=4 * own,
        optimizer=_MOMENTS * 4 * own,
        gathered=2 * 4 * root + held + unsummed,  # the root's gradient is whole until the end of the backward pass
        activations=activations(config, rows, dtype, recompute),
        parameter_traffic=round(share * (gathers * parts * size + (1 if reshard == "step" else passes) * root * 4)),
        gradient_traffic=round(share * sums * total * 4),
        flops=model.flops_per_token(config.block_size)
        * rows
        * passes
        * config.block_size
        * (4 / 3 if recompute else 1),
    )


def activations(config: GPTConfig, rows: int, dtype: torch.dtype, recompute: bool) -> int:
    """Bytes that are kept between the forward and the backward pass of `rows` rows."""
    narrow, length = 2 * config.head_dim, min(128, config.block_size)
    inner = config.inner_dim * narrow // config.n_embd
    shape = config.replace(n_embd=narrow, n_head=2, n_inner=inner, vocab_size=64, block_size=length)
    one, two = (_kept(shape.replace(n_layer=n), dtype, recompute) for n in (1, 2))
    each = two - one
    inside = 0.0  # of the block that is computed again
    if recompute:
        one_plain, two_plain = (_kept(shape.replace(n_layer=n), dtype, False) for n in (1, 2))
        inside = two_plain - one_plain
    numbers = rows * config.block_size * config.n_embd
    return round(numbers * (one - each + each * config.n_layer + inside))


def _kept(config: GPTConfig, dtype: torch.dtype, recompute: bool) -> float:
    """Bytes that a small model keeps for its backward pass, for each number of the residual stream."""
    storages: dict[int, Tensor] = {}
    model = GPT(config).train()
    model.recompute = recompute
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.numel() and x.untyped_storage().data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.zeros((2, config.block_size), dtype=torch.int64)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, ids)[1]
    del loss
    return sum(x.untyped_storage().nbytes() for x in storages.values()) / (ids.numel() * config.n_embd)


@contextmanager
def _fake_ranks(size: int) -> Iterator[Ranks]:
    """A group of `size` processes of which this one is the first and the others do not exist."""
    import torch.testing._internal.distributed.fake_pg as fake_pg  # registers the backend "fake"

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=size)
    try:
        yield Ranks(0, size, None, None, torch.device("cpu"), 1.0, "forward")
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
    )
    computing = found.flops / (given.tflops * 1e12)
    sending = found.traffic / (given.gigabytes * 1e9)
    lines = [
        f"{name}: {found.parameters / 1e9:.2f} billion parameters on {ranks} ranks",
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
        f"  sent by a rank, GB: parameters {found.parameter_traffic / 1e9:.2f}, gradients {found.gradient_traffic / 1e9:.2f}",
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
        "--rows", type=int, default=1, help="rows of block_size tokens in a pass of one rank; default 1"
    )
    parser.add_argument("--passes", type=int, default=1, help="passes of a step (--grad-accum); default 1")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the products")
    parser.add_argument("--reshard", choices=SHARDING, default="forward", help="as in gptfast train; default forward")
    parser.add_argument("--recompute", action="store_true", help="as in gptfast train")
    parser.add_argument("--tflops", type=float, default=400.0, help="what a GPU reaches, 10^12 FLOP/s; default 400")
    parser.add_argument("--gigabytes", type=float, default=50.0, help="what a GPU sends a second, GB; default 50")
    given = parser.parse_args(arguments)
    for size in given.ranks:
        if size < 2:
            parser.error(f"--ranks {size}: expected at least 2")
        print(_report(given.preset, size, given))


if __name__ == "__main__":
    main()
