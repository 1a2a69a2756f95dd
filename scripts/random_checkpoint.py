"""A checkpoint folder of gpt-oss' shape with random weights, its experts in MXFP4, in the layout of the published files.

    python scripts/random_checkpoint.py FOLDER [--preset gpt-oss-20b] [--layers N] [--seed 0] [--shard-gb 1]

gpt-oss-20b is 13.8 GB, on the disk and never in memory: at most a shard is held. Each tensor comes from a counter (Philox) whose key
is the seed and the tensor's name, so any of them is the same alone. Experts have any of the 16 codes and scales of 2^-8 to 2^-6,
matrices are in bfloat16, of sizes 2^-8 to 2^-5, norms are 1.
"""

from __future__ import annotations

import argparse
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig
from gptfast.checkpoints import hf_layout
from gptfast.models.export import Description, file_tensors
from gptfast.nn.meta import only_shapes

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
NOT_CONVERTED = ("self_attn", "mlp.router", "embed_tokens", "lm_head")
LEAST_SCALE, SCALES = 119, 3  # bytes of 2^-8 and its followers
EXPONENT = 119  # of a bfloat16 of 2^-8


def bits(seed: int, name: str, count: int) -> np.ndarray:
    """So many random bytes."""
    counter = np.random.Philox(key=[seed, zlib.crc32(name.encode())])
    return counter.random_raw(-(-count // 8)).view(np.uint8)[:count]


def described(config: GPTConfig, seed: int) -> Description:
    """The files of the folder, each of whose tensors is made when it is written."""
    with only_shapes():
        state = GPT(config).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, source in file_tensors(config, state).items():
        shape = tuple(source.form(state[source.name]).shape)
        if name.endswith(EXPERTS):
            E, rows, columns = shape
            shapes[name + "_blocks"] = (E, columns, rows // 32, 16)
            shapes[name + "_scales"] = (E, columns, rows // 32)
        else:
            shapes[name] = shape

    def read(name: str) -> Tensor:
        shape, size = shapes[name], int(np.prod(shapes[name]))
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        if name.endswith("_blocks"):
            return torch.from_numpy(bits(seed, name, size)).view(shape)
        if name.endswith("_scales"):
            return torch.from_numpy(LEAST_SCALE + bits(seed, name, size) % SCALES).view(shape)
        x = bits(seed, name, 2 * size).view(np.uint16)
        exponents = EXPONENT + (x >> 8 & 3)  # sign and fraction stay
        return torch.from_numpy((x & 0x807F | exponents << 7).view(np.int16)).view(torch.bfloat16).view(shape)

    settings = hf_layout.to_hf(config, "bfloat16", {})
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": list(NOT_CONVERTED)}
    sizes = {
        name: int(np.prod(shape)) * (1 if name.endswith(("_blocks", "_scales")) else 2)
        for name, shape in shapes.items()
    }
    return Description(settings, None, sizes, read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard-gb", type=float, default=1.0, help="the largest size of a file, and the memory that it takes"
    )
    args = parser.parse_args()
    config = GPTConfig.preset(args.preset, **({} if args.layers is None else {"n_layer": args.layers}))
    start, files = time.perf_counter(), described(config, args.seed)
    files.write(args.folder, int(args.shard_gb * 1e9))
    total, seconds = sum(files.sizes.values()), time.perf_counter() - start
    print(f"{args.folder}: {total / 1e9:.2f} GB in {seconds:.0f} s, {total / 1e9 / seconds:.2f} GB/s")


if __name__ == "__main__":
    main()
