"""A large checkpoint of experts in MXFP4, mapped: how long loading takes, what memory it holds, and decoding beside the read of what
a token needs.

    python scripts/random_checkpoint.py FOLDER
    python benchmarks/bench_checkpoint.py FOLDER [--rounds 5] [--tokens 32] [--prompt 32] [--threads 2] [--out FILE]

Decoding and a loop that only reads all weights take turns, on the same threads and pages. A token needs the matrices of attention
and of the head once, and the blocks and scales of the experts that its router chooses; the floor is these bytes at the speed of the
loop of the same round (wanted: 0.8 of it). Rows go to the terminal and, as JSON, to --out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gptfast.engine import CompiledGPT
from gptfast.generation.sampling import SamplingParams
from gptfast.machine import cpu_name

GREEDY = SamplingParams(0.0, 0, 1.0, 0, 0, 0)


def resident() -> dict[str, float]:
    """GB of this process's memory: all of it, its own, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(("Rss", "VmRSS"))
    }
    return {"resident": found["VmRSS"], "own": found["RssAnon"], "mapped": found["RssFile"]}


def bytes_a_token(model: CompiledGPT) -> tuple[int, int]:
    """What a token reads of matrices: all, and of the experts alone. The cache, embedding and vectors are left out."""
    config = model.config
    C, F, L = config.n_embd, config.inner_dim, config.n_layer
    experts = L * (config.n_expert_per_tok or 0) * 3 * C * F * 17 // 32
    heads = (config.n_head + 2 * config.kv_heads) * config.head_dim
    dense = L * C * (heads + config.attn_dim) + config.vocab_size * C
    return experts + dense * 3 // 2, experts  # bfloat16 takes 12 bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    model = CompiledGPT.from_pretrained(args.folder, "mxfp4", threads=args.threads)
    row: dict[str, Any] = {"cpu": cpu_name(), "threads": model.threads, "load_s": time.perf_counter() - start}
    print(f"{model}, loaded in {row['load_s']:.1f} s: {resident()}")
    total, experts = bytes_a_token(model)
    prompt = torch.randint(model.config.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    runner = model.runner(1)
    rounds: list[dict[str, float]] = []
    for n in range(args.rounds + 1):  # the first reads from the disk
        speed = model._core.read_rate(1)
        (slot,) = runner.allocate(1)
        start = time.perf_counter()
        logits = runner.extend([slot], [prompt])
        assert isinstance(logits, torch.Tensor)  # of the last token alone
        prefill = len(prompt) / (time.perf_counter() - start)
        start = time.perf_counter()
        made = runner.decode_steps([slot], logits, args.tokens + 1, [GREEDY])  # the last of which is not computed with
        seconds = (time.perf_counter() - start) / (len(made[0]) - 1)
        runner.free(slot)
        speed = (speed + model._core.read_rate(1)) / 2
        found = {
            **{"read_gb_s": speed / 1e9, "prefill_tok_s": prefill, "decode_tok_s": 1 / seconds},
            **{"of_floor": total / speed / seconds, "of_experts": experts / speed / seconds},
        }
        print(f"round {n}: " + ", ".join(f"{name} {x:.3g}" for name, x in found.items()))
        rounds += [found] if n else []
    row |= {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    row |= resident() | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    row |= {"gb_a_token": total / 1e9, "experts_gb_a_token": experts / 1e9, "rounds": rounds}
    print(", ".join(f"{name} {x:.3g}" for name, x in row.items() if isinstance(x, float)))
    if args.out:
        args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
