"""Generation with GPT-2 124M by format of the weights, beside transformers, llama.cpp and CTranslate2, in one run.

    python benchmarks/bench_generate.py [--rounds 5] [--formats int8 int4] [--work decode] [--limit-minutes 20]

Batch-1 decode (greedy, after 16 tokens), prefill of 512 tokens, decode of 8 and 32 sequences, 64 tokens by 5 beams. All take turns: ours and its
peers of one format within a round, so that ratios (medians over the rounds) compare like with like on a machine whose
memory changes its speed within minutes. The time of a signal between two threads, which changes with it, is printed; rounds
in which it shows another program at work are made again. Beside batch-1 decode stands how much of a plain read loop over the same packed weights it reaches.

llama-cpp-python, gguf and ctranslate2 are used where they are installed. Weights are random: they cost the same.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from generate_peers import THREADS, CTranslate2, LlamaCpp, Ours, Runner, Transformers, prompt

import gptfast
from gptfast.benchmarking import measure_machine

PEERS = {  # of each format, by the width of the weights
    "float32": ["transformers float32", "llama.cpp f32", "CTranslate2 float32"],
    "bfloat16": ["transformers bfloat16", "llama.cpp bf16", "CTranslate2 bfloat16"],
    "int8": ["transformers bfloat16", "llama.cpp q8_0", "CTranslate2 int8"],
    "int4": ["llama.cpp q4_0", "llama.cpp q4_K_M"],
    "nf4": ["llama.cpp q4_0", "llama.cpp q4_K_M"],
    "q4": ["llama.cpp q4_K_M"],
}
WORK = {  # rows, tokens
    **{"decode": (1, 48), "prefill": (1, 512), "batch 8": (8, 12), "batch 32": (32, 6)},
    "beams": (1, 64),  # the best of them
}
BEAMS = 5
DISTURBED = 2000.0  # ns of a signal between threads, 40 to 400 when they run by themselves
MODULES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "CTranslate2": "ctranslate2"}


def maker(model: gptfast.GPT, name: str, folder: Path) -> Callable[[], Runner]:
    program, _, kind = name.partition(" ")
    if program == "transformers":
        return partial(Transformers, model, getattr(torch, kind))
    if program == "llama.cpp":
        return partial(LlamaCpp, model, kind, folder)
    if program == "CTranslate2":
        return partial(CTranslate2, model, kind, folder / "ctranslate2")
    return partial(Ours, model, kind)


def start(model: gptfast.GPT, name: str, folder: Path) -> Runner | None:
    """None where a peer does not run this format on this machine."""
    try:
        return maker(model, name, folder)()
    except (ValueError, RuntimeError) as error:
        if name.startswith("gptfast"):
            raise
        print(f"{name} is left out: {error}")
        return None


def rate(runner: Runner, work: str) -> float:
    """Tokens a second."""
    rows, tokens = WORK[work]
    if work == "prefill":
        took = runner.prefill(prompt(0, tokens))
    elif work == "beams":
        took = runner.beams(BEAMS, tokens)
    else:
        took = runner.decode(rows, tokens)
    return rows * tokens / took


@dataclass
class Round:
    """Rates of all in turn, the share of the read loop that ours reached, and the slowest signal between threads."""

    rates: dict[str, float]
    share: float
    signal: float

    @classmethod
    def run(cls, runners: dict[str, Runner], work: str) -> Round:
        signals, rates, share = [signal()], {}, 0.0
        for name, runner in runners.items():
            before = runner.read_seconds() if isinstance(runner, Ours) else 0.0
            rates[name] = rate(runner, work)
            if isinstance(runner, Ours):
                share = rates[name] * (before + runner.read_seconds()) / 2
            signals.append(signal())
        return cls(rates, share, max(signals))


def signal() -> float:
    """Nanoseconds; microseconds mean that somebody else uses a core."""
    return torch.ops.gptfast.signal_ns(2000)


def calm_rounds(runners: dict[str, Runner], work: str, wanted: int, until: float) -> tuple[list[Round], int]:
    """So many rounds that nobody disturbed, out of four times as many at most, and how many were left out."""
    calm: list[Round] = []
    disturbed: list[Round] = []
    while len(calm) < wanted and len(disturbed) < 3 * wanted and (not calm + disturbed or time.monotonic() < until):
        one = Round.run(runners, work)
        (calm if one.signal < DISTURBED else disturbed).append(one)
    return (calm, len(disturbed)) if calm else (disturbed, 0)


def compare(runners: dict[str, Runner], work: str, wanted: int, until: float) -> None:
    """A line each: the median rate, and the median ratio of ours to it."""
    for runner in runners.values():
        rate(runner, work)  # memory and threads are made
    rounds, left_out = calm_rounds(runners, work, wanted, until)
    (ours,) = (name for name in runners if name.startswith("gptfast"))
    for name in runners:
        line = f"{work:<10}{name:<26}{statistics.median(r.rates[name] for r in rounds):>9.0f}"
        if name == ours:
            line += f"{100 * statistics.median(r.share for r in rounds):>10.0f} %" if work == "decode" else " " * 12
            line += f"{'':>11}   {len(rounds)} rounds, signal to {max(r.signal for r in rounds):.0f} ns"
            line += f", {left_out} disturbed left out" if left_out else ""
        else:
            ratios = [r.rates[ours] / r.rates[name] for r in rounds]
            line += f"{'':>12}{statistics.median(ratios):>10.2f}x   {min(ratios):.2f} to {max(ratios):.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--limit-minutes", type=float, default=60.0, help="no new rounds are begun after so long")
    parser.add_argument("--folder", type=Path, help="where the peers' files are kept (default: a temporary one)")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.limit_minutes
    machine = measure_machine()
    print(f"{machine.name}, {THREADS} threads, {machine.isa}, torch {machine.torch}")
    print(f"fp32 {machine.fp32_gflops:.0f}, bf16 {machine.bf16_gflops:.0f} GFLOP/s, copy {machine.copy_gbs:.0f} GB/s")
    absent = [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]
    if absent:
        print(f"not installed, so left out: {', '.join(absent)}")
    print(f"\n{'GPT-2 124M':<36}{'tokens/s':>9}{'of reading':>12}{'ours is':>11}   over the rounds")
    torch.manual_seed(0)
    model = gptfast.GPT(gptfast.GPTConfig.preset("gpt2", dropout=0.0)).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in options.formats:
            names = [f"gptfast {dtype}", *(p for p in PEERS[dtype] if p.partition(" ")[0] not in absent)]
            runners = {name: runner for name in names if (runner := start(model, name, folder)) is not None}
            for work in options.work:
                able = {name: r for name, r in runners.items() if work != "beams" or hasattr(r, "beams")}
                compare(able, work, options.rounds, until)
            print(flush=True)
            runners.clear()
            gc.collect()


if __name__ == "__main__":
    main()
