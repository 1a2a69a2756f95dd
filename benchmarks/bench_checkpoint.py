"""A large checkpoint of experts in MXFP4, mapped: how long loading takes, what memory it holds, and decoding beside the read of what
a token needs.

    python scripts/random_checkpoint.py FOLDER
    python benchmarks/bench_checkpoint.py FOLDER [--rounds 5] [--tokens 32] [--prompt 32] [--threads 2] [--out FILE]
        [--llama-bin BUILD/llama_decode --gguf FILE]

Decoding and a loop that only reads all weights take turns, on the same threads and pages. A token needs the matrices of attention
and of the head once, and the blocks and scales of the experts that its router chooses; the floor is these bytes at the speed of the
loop of the same round (wanted: 0.8 of it). Rows go to the terminal and, as JSON, to --out.

With --llama-bin (built by peers/build_llama.sh) and --gguf (the same weights, by scripts/gguf_checkpoint.py) llama.cpp takes turns
with that, on the same prompt: it reads and decodes it, once to warm up and once for the clock. Its process ends with its turn,
because memory may not have room for the weights twice; ours comes first in one round and second in the next. Its first logits
stand beside ours, and in the last line the medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generate_peers import Process

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


def our_turn(model: CompiledGPT, runner: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    total, experts = bytes_a_token(model)
    model._core.read_rate(1)  # pages that the other program took
    speed = model._core.read_rate(1)
    (slot,) = runner.allocate(1)
    start = time.perf_counter()
    logits = runner.extend([slot], [prompt])
    assert isinstance(logits, torch.Tensor)  # of the last token alone
    prefill = len(prompt) / (time.perf_counter() - start)
    first = logits[0, :5].tolist()  # before decoding writes into them
    start = time.perf_counter()
    made = runner.decode_steps([slot], logits, tokens + 1, [GREEDY])  # the last of which is not computed with
    seconds = (time.perf_counter() - start) / (len(made[0]) - 1)
    runner.free(slot)
    speed = (speed + model._core.read_rate(1)) / 2
    return {
        **{"read_gb_s": speed / 1e9, "prefill_tok_s": prefill, "decode_tok_s": 1 / seconds},
        **{"of_floor": total / speed / seconds, "of_experts": experts / speed / seconds},
        "logits": first,
    }


def llama_turn(program: Path, file: Path, threads: int, prompt: int, tokens: int) -> dict[str, Any]:
    """llama.cpp on the same weights, in a process that ends."""
    start = time.perf_counter()
    peer = Process("llama.cpp", [str(program), str(file), str(threads)], threads)
    load = time.perf_counter() - start
    try:
        for _ in range(2):  # the first reads from the disk
            prefill = peer.ask("prefill", prompt)["seconds"]
            decode = peer.ask("decode", 1, tokens, prompt)["seconds"]
        found = {"llama_load_s": load, "llama_prefill_tok_s": prompt / prefill, "llama_decode_tok_s": tokens / decode}
        return found | {"llama_peak": peer.peak_gb()} | {"llama_logits": peer.ask("logits", prompt)["logits"]}
    finally:
        peer.close()


def line(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {x:.3g}" for name, x in found.items() if isinstance(x, float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--llama-bin", type=Path, help="llama_decode, built with llama.cpp")
    parser.add_argument("--gguf", type=Path, help="the weights for it")
    args = parser.parse_args()
    if (args.llama_bin is None) != (args.gguf is None):
        parser.error("--llama-bin and --gguf go together")
    start = time.perf_counter()
    model = CompiledGPT.from_pretrained(args.folder, "mxfp4", threads=args.threads)
    row: dict[str, Any] = {"cpu": cpu_name(), "threads": model.threads, "load_s": time.perf_counter() - start}
    print(f"{model}, loaded in {row['load_s']:.1f} s: {resident()}")
    total, experts = bytes_a_token(model)
    prompt = [37 * n % min(50257, model.config.vocab_size) for n in range(args.prompt)]  # as in peers/llama_decode.cpp
    runner = model.runner(1)
    turns: list[Callable[[], dict[str, Any]]] = [lambda: our_turn(model, runner, prompt, args.tokens)]
    if args.gguf:
        turns.append(lambda: llama_turn(args.llama_bin, args.gguf, model.threads, args.prompt, args.tokens))
    rounds: list[dict[str, Any]] = []
    for n in range(args.rounds + 1):  # the first reads from the disk
        found: dict[str, Any] = {}
        for turn in turns if n % 2 else turns[::-1]:
            found |= turn()
        if args.gguf:
            for name in ("logits", "llama_logits"):
                print(f"{name:<14}{' '.join(f'{x:9.4f}' for x in found[name])}")
            found["decode_of_llama"] = found["decode_tok_s"] / found["llama_decode_tok_s"]
            found["prefill_of_llama"] = found["prefill_tok_s"] / found["llama_prefill_tok_s"]
        print(f"round {n}: {line(found)}", flush=True)
        rounds += [found] if n else []
    row |= {name: statistics.median(r[name] for r in rounds) for name, x in rounds[0].items() if isinstance(x, float)}
    row |= resident() | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    row |= {"gb_a_token": total / 1e9, "experts_gb_a_token": experts / 1e9, "rounds": rounds}
    print(line(row))
    if args.out:
        args.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
