"""`gptfast serve` with GPT-2 124M through the openai client: time to the first token, and 16 streams beside the offline batch.

    python benchmarks/bench_serve.py [--format int8] [--rounds 5] [--streams 16] [--tokens 128] [--top-p 1]

The server is a process of its own; the client runs on the same cores, and its time counts. In each round the streams and
the same texts by `CompiledGPT.generate` take turns, so that their ratio (the median over the rounds) holds on a machine
that changes its speed. Weights are random: they cost the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from generate_peers import THREADS, prompt, seconds

import gptfast
from gptfast.benchmarking import measure_machine
from gptfast.engine import FORMATS
from gptfast.tokenizer import GPT2Tokenizer

if TYPE_CHECKING:
    from openai import OpenAI

    from gptfast.engine import CompiledGPT


@contextmanager
def serving(folder: Path, dtype: str) -> Iterator[str]:
    """The base URL of `gptfast serve` in a process of its own."""
    command = [sys.executable, "-m", "gptfast", "serve", "--model", str(folder), "--port", "0", "--quantize", dtype]
    command += ["--name", "gpt2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise SystemExit("the server did not start")
        try:
            yield found[1] + "/v1"
        finally:
            process.terminate()


def first_token(client: OpenAI, n: int) -> float:
    """Seconds until the first token after a prompt of 64."""
    start = time.perf_counter()
    with client.completions.create(model="gpt2", prompt=prompt(n, 64), max_tokens=2, stream=True) as stream:
        next(iter(stream))
        return time.perf_counter() - start


def stream_all(client: OpenAI, count: int, tokens: int, sampling: dict[str, float]) -> float:
    """Tokens a second of so many streams at once, to their ends."""

    def one(n: int) -> int:
        ask = {"model": "gpt2", "prompt": prompt(n), "max_tokens": tokens, **sampling}
        usage = None
        for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage
        assert usage is not None, "a stream was cut"
        return usage.completion_tokens  # the end token is as likely as any

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        made = sum(pool.map(one, range(count)))
    return made / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="int8", choices=FORMATS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=1.0)
    options = parser.parse_args()
    try:
        from openai import OpenAI
    except ImportError:
        raise SystemExit("openai is not installed; pip install 'gptfast-kernels[serve]' openai") from None
    machine = measure_machine()
    print(f"{machine.name}, {THREADS} threads, {machine.isa}, torch {machine.torch}")
    torch.manual_seed(0)
    model = gptfast.GPT(gptfast.GPTConfig.preset("gpt2", dropout=0.0)).eval()
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        GPT2Tokenizer().save(temporary)
        compiled = model.compile_for_inference(options.format)
        with serving(Path(temporary), options.format) as url, OpenAI(base_url=url, api_key="-") as client:
            compare(client, compiled, options)


def compare(client: OpenAI, compiled: CompiledGPT, options: argparse.Namespace) -> None:
    sampling = {"temperature": options.temperature, "top_p": options.top_p}
    prompts, total = [prompt(n) for n in range(options.streams)], options.streams * options.tokens

    def offline() -> float:
        return total / seconds(lambda: compiled.generate(prompts, max_new_tokens=options.tokens, **sampling))

    def served() -> float:
        return stream_all(client, options.streams, options.tokens, sampling)

    offline(), served(), first_token(client, 0)
    firsts, rates = [], []
    for n in range(options.rounds):
        firsts += [first_token(client, 100 * n + i) for i in range(5)]
        rates.append((offline(), served()))
    firsts = sorted(1000 * first for first in firsts)
    print(f"GPT-2 124M, {options.format}, {sampling}; {options.rounds} rounds of {options.tokens} tokens")
    print(f"first token after 64: {statistics.median(firsts):.0f} ms, {firsts[0]:.0f} to {firsts[-1]:.0f}")
    ratios = [theirs / ours for ours, theirs in rates]
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    print(f"{options.streams} streams: {medians[1]:.0f} tokens/s, offline batch {medians[0]:.0f}, ", end="")
    print(f"{100 * statistics.median(ratios):.0f} % of it ({100 * min(ratios):.0f} to {100 * max(ratios):.0f})")


if __name__ == "__main__":
    main()
