"""Generation with GPT-2 124M by format of the weights, beside other programs on the same weights, in one run.

    python benchmarks/bench_generate.py [--formats int8 q4] [--work decode] [--rounds 5] [--limit-minutes 20]
        [--llama-bin BUILD/llama_decode] [--ik-bin BUILD/llama_decode] [--openvino-python BIN] [--ort-python BIN]

Batch-1 decode (greedy, after 16 tokens), prefill of 512 tokens, decode of 8 and 32 sequences, 64 tokens by 5 beams. Every
program is a process with its model loaded. All take turns within a round, in an order that rotates, so that ratios (medians
over the rounds) compare like with like on a machine whose memory changes its speed within minutes. A turn of which other
processes take more than 6% of the CPU is made again, and after three such turns the round is dropped. Before the timing the
first five logits behind 64 tokens must agree. Beside batch-1 decode stands how much of a plain read loop over the same packed
weights, run before and after in the same turn, it reaches.

What is timed: of ours the public `generate` of the compiled model from Python, greedy; of transformers and CTranslate2 the
same call of theirs; llama.cpp and ik_llama.cpp from C++ (peers/llama_decode.cpp: llama_decode and the largest logit, no
Python, no sampler; built by peers/build_llama.sh); OpenVINO and ONNX Runtime by their Python API, a call a step. What is not
here is left out and said. Weights are random: they cost the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generate_peers import Process, Programs
from generate_rounds import FOREIGN, Rounds, run_rounds, summary, take_turn
from gpu.provenance import git

from gptfast.benchmarking import measure_machine

PEERS = {  # of each format, by the width of the weights; the words after the format go to the program
    "float32": ["transformers float32", "llama.cpp f32", "ik f32", "OpenVINO float32 f32", "ORT float32"],
    "bfloat16": ["transformers bfloat16", "llama.cpp bf16", "ik bf16 repack", "OpenVINO float32 bf16"],
    "int8": ["transformers bfloat16", "llama.cpp q8_0", "ik q8_0", "ik q8_0_r8", "OpenVINO int8 bf16", "ORT int8"],
    "int4": ["llama.cpp q4_0", "llama.cpp q4_K_M", "ik q4_0 repack", "OpenVINO int4 bf16"],
    "nf4": ["llama.cpp q4_0", "llama.cpp q4_K_M"],
    "q4": ["llama.cpp q4_K_M", "ik q4_K_M", "ik iq4_ks repack", "OpenVINO int4 bf16"],
}
for kind in ("float32", "bfloat16", "int8"):
    PEERS[kind].append(f"CTranslate2 {kind}")
WORK = {  # rows, tokens
    **{"decode": (1, 48), "prefill": (1, 512), "batch 8": (8, 12), "batch 32": (32, 6)},
    "beams": (1, 64),  # the best of them
}
BEAMS = 5
BEAM_PROGRAMS = ("gptfast", "transformers", "CTranslate2")
# How far the first five logits (about 0.6 in size) may be from fp32's. Measured: 0.0005 (llama.cpp, whose cache is fp16); 0.010,
# 0.037 and 0.27 (OpenVINO, which computes in bf16).
AGREE = {"float32": 2e-3, "bfloat16": 3e-2, "int8": 8e-2, "int4": 0.45, "nf4": 0.45, "q4": 0.45}


def words_of(work: str, tokens: int) -> tuple[Any, ...]:
    """The command of a piece of work."""
    rows = WORK[work][0]
    if work == "prefill":
        return "prefill", tokens
    if work == "beams":
        return "beams", BEAMS, tokens
    return "decode", rows, tokens


def start(programs: Programs, name: str) -> Process | None:
    """None, and a line that says why, where a peer does not run this format on this machine."""
    try:
        return Process(name, programs.command(name), programs.threads)
    except (LookupError, ImportError, RuntimeError, OSError) as error:
        if name.startswith("gptfast"):
            raise
        print(f"{name} is left out: {error}")
        return None


def disagreements(logits: dict[str, list[float]], reference: list[float], tolerance: float) -> list[str]:
    """Who does not compute the same model."""
    return [
        name
        for name, found in logits.items()
        if len(found) != len(reference)
        or not all(abs(a - b) <= tolerance for a, b in zip(found, reference, strict=True))
    ]


def asked(workers: dict[str, Process], *words: Any) -> dict[str, dict[str, Any]]:
    """What each says; a peer that cannot is left out, and said; ours must."""
    found = {}
    for name, worker in workers.items():
        try:
            found[name] = worker.ask(*words)
        except RuntimeError as error:
            if name.startswith("gptfast"):
                raise
            print(f"{name} is left out of {words[0]}: {error}")
    return found


def check_logits(workers: dict[str, Process], dtype: str, reference: list[float]) -> dict[str, list[float]]:
    """The first five of each, printed; who is wrong is left out, ours stops everything."""
    found = {name: answer["logits"] for name, answer in asked(workers, "logits", 64).items()}
    for name in workers.keys() - found.keys():
        workers.pop(name).close()
    for name, logits in found.items():
        print(f"  logits {name:<26}{' '.join(f'{x:9.4f}' for x in logits)}")
    for name in disagreements(found, reference, AGREE[dtype]):
        if name.startswith("gptfast"):
            raise SystemExit(f"{name}: logits {found[name]}, expected {reference} within {AGREE[dtype]}")
        print(f"{name} is left out: its logits are not those of the model, {reference} within {AGREE[dtype]}")
        workers.pop(name).close()
    return found


def show(work: str, rounds: Rounds, ours: str, size: float) -> None:
    """A line each: the median rate, and the median ratio of ours to it."""
    if not rounds.kept:
        print(f"{work:<10}not measured: all {rounds.dropped} rounds were disturbed", flush=True)
        return
    for name in rounds.names:
        line = f"{work:<10}{name:<26}{statistics.median(rounds.rates(name)):>9.1f}"
        if name == ours:
            shares = rounds.shares(ours, size)
            line += f"{100 * statistics.median(shares):>10.0f} %" if shares else " " * 12
            line += f"{'':>11}   {len(rounds.kept)} rounds, {rounds.dropped} dropped, {rounds.repeated} turns repeated"
        else:
            ratio = summary(rounds.ratios(ours, name))
            line += f"{'':>12}{ratio['median']:>10.2f}x   {ratio['min']:.2f} to {ratio['max']:.2f}"
        print(line, flush=True)


def rows_of(rounds: Rounds, ours: str, size: float) -> list[dict[str, Any]]:
    """What the file keeps of each program."""
    rows = []
    for name in rounds.names if rounds.kept else []:
        row: dict[str, Any] = {"name": name, "tokens_per_s": rounds.rates(name)}
        if name != ours:
            row["ours_is"] = summary(rounds.ratios(ours, name))
        elif shares := rounds.shares(ours, size):
            row["share_of_reading"] = summary(shares)
            row["read_gb_per_s"] = summary([one[ours].reading / 1e9 for one in rounds.kept])
        row["foreign_cpu"] = [round(one[name].foreign, 4) for one in rounds.kept]
        rows.append({**row, "rounds": len(rounds.kept), "dropped": rounds.dropped, "repeated": rounds.repeated})
    return rows


def compare(
    workers: dict[str, Process], dtype: str, work: str, options: argparse.Namespace, until: float
) -> list[dict]:
    ours = f"gptfast {dtype}"
    able = {name: w for name, w in workers.items() if work != "beams" or name.split()[0] in BEAM_PROGRAMS}
    rows, tokens = WORK[work][0], min(WORK[work][1], options.tokens or 10**6)
    words = words_of(work, tokens)
    able = {name: able[name] for name in asked(able, *words)}  # memory and threads are made
    turn = partial(turn_of, ours=ours, work=work, words=words, tokens=rows * tokens, cores=os.cpu_count() or 1)
    rounds = run_rounds(able, turn, options.rounds, until, options.foreign)
    size = 1e6 * workers[ours].about["weights_mb"]
    show(work, rounds, ours, size)
    about = {name: {**w.about, "peak_gb": round(w.peak_gb(), 3)} for name, w in able.items()}
    return [
        {"format": dtype, "work": work, "rows": rows, "tokens": tokens, **row, **about[row["name"]]}
        for row in rows_of(rounds, ours, size)
    ]


def turn_of(worker: Process, ours: str, work: str, words: tuple[Any, ...], tokens: int, cores: int):
    return take_turn(worker, words, tokens, work == "decode" and worker.name == ours, cores)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument(
        "--peers", nargs="+", help="only these programs: llama.cpp ik OpenVINO ORT CTranslate2 transformers"
    )
    parser.add_argument("--limit-minutes", type=float, default=60.0, help="no new rounds are begun after so long")
    parser.add_argument(
        "--folder", type=Path, help="where the weights and the peers' files are kept (default: a temporary one)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/generate.jsonl"), help="a JSON value a row, appended"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, help="at most so many a piece of work, to try whether everything runs")
    parser.add_argument("--foreign", type=float, default=FOREIGN, help="share of the CPU that others may take; 2: any")
    parser.add_argument("--llama-bin", type=Path, help="llama_decode, built with llama.cpp")
    parser.add_argument("--ik-bin", type=Path, help="llama_decode, built with ik_llama.cpp")
    parser.add_argument("--openvino-python", type=Path, help="python of an environment with openvino and optimum-intel")
    parser.add_argument("--ort-python", type=Path, help="python of an environment with onnxruntime and onnx")
    return parser.parse_args()


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Where and when the rows are measured."""
    machine = measure_machine()
    print(f"{machine.name}, {options.threads} threads, {machine.isa}, torch {machine.torch}, load {os.getloadavg()}")
    print(f"fp32 {machine.fp32_gflops:.0f}, bf16 {machine.bf16_gflops:.0f} GFLOP/s, copy {machine.copy_gbs:.0f} GB/s")
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.as_dict(),
        "threads": options.threads,
        "command": shlex.join(sys.argv),
        "foreign_limit": options.foreign,
    }


def main() -> None:
    options = parse()
    until = time.monotonic() + 60 * options.limit_minutes
    torch.set_num_threads(options.threads)
    where = describe(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        programs = Programs(
            folder, options.threads, options.llama_bin, options.ik_bin, options.openvino_python, options.ort_python
        )
        programs.write_model()
        (first,) = [Process("gptfast float32", programs.command("gptfast float32"), options.threads)]
        reference = first.ask("logits", 64)["logits"]
        first.close()
        for dtype in options.formats:
            names = [p for p in PEERS[dtype] if not options.peers or p.split()[0] in options.peers]
            workers = {n: w for n in [f"gptfast {dtype}", *names] if (w := start(programs, n)) is not None}
            try:
                logits = check_logits(workers, dtype, reference)
                print(f"\n{'GPT-2 124M':<36}{'tokens/s':>9}{'of reading':>12}{'ours is':>11}   over the rounds")
                for work in options.work:
                    for row in compare(workers, dtype, work, options, until):
                        line = {**where, "load": os.getloadavg(), **row, "logits": logits[row["name"]]}
                        with options.out.open("a") as out:
                            out.write(json.dumps(line) + "\n")
            finally:
                for worker in workers.values():
                    worker.close()
            print(flush=True)


if __name__ == "__main__":
    main()
