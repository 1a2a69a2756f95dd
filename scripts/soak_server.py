"""A soak of the server: mixed requests from many clients, among them long and bad ones, ones that leave amid their
stream, and more than the queue holds; memory must stay flat.

    python scripts/soak_server.py --requests 2000 [--quantize int8]

It serves a small model of random weights in this process. The first two fifths of the requests warm up; then the
resident memory may grow by no more than --megabytes, and at the end no sequence may be left.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import random
import threading
import time
from pathlib import Path

import httpx
import torch
import uvicorn

from gptfast import GPT, GPTConfig
from gptfast.serving.app import Limits, create_app
from gptfast.tokenizer import CharTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.:\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument(
        "--quantize", default="int8", help="a format of the native engine; none: PyTorch runs the model"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train(LETTERS)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=tokenizer.vocab_size)
    model = GPT(config).eval()
    model = model if args.quantize == "none" else model.compile_for_inference(args.quantize)
    app = create_app(model, tokenizer, "m", Limits(max_rows=8, max_queue=60, seconds=60))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        soak(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app, args)
    finally:
        server.should_exit = True
        thread.join()


def soak(url: str, app, args: argparse.Namespace) -> None:
    counts: dict[str, int] = {}
    with httpx.Client(base_url=url, timeout=60) as client, concurrent.futures.ThreadPoolExecutor(args.clients) as pool:
        before = 0.0
        for part in range(5):
            numbers = range(part * args.requests // 5, (part + 1) * args.requests // 5)
            for outcome in pool.map(lambda n: ask(client, n), numbers):
                counts[outcome] = counts.get(outcome, 0) + 1
            gc.collect()
            print(f"{numbers.stop} requests, {resident():.1f} MB", counts, flush=True)
            before = resident() if part == 1 else before
    deadline = time.monotonic() + 30
    while app.state.worker.open_sequences or any(app.state.worker.scheduler.runner.lengths):
        if time.monotonic() > deadline:
            raise SystemExit(f"{app.state.worker.open_sequences} sequences are left")
        time.sleep(0.01)
    grown = resident() - before
    print(f"memory grew by {grown:.1f} MB after the first two fifths")
    if grown > args.megabytes:
        raise SystemExit(f"more than {args.megabytes} MB")
    wanted = {"200", "400", "left", "streamed"} | ({"429"} if args.requests >= 1000 else counts.keys() & {"429"})
    if counts.keys() != wanted or counts.get("429", 0) > args.requests / 2:
        raise SystemExit(f"the mix was not what it should be: {counts}; expected {wanted}, and 429 for a few")


def ask(client: httpx.Client, n: int) -> str:
    """One request of a kind that depends on n; returns what came of it."""
    rng = random.Random(n)
    prompt = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 60)))
    body = {"model": "m", "prompt": prompt, "max_tokens": rng.randint(1, 60), "seed": n, "n": rng.choice([1, 1, 1, 3])}
    body |= rng.choice([{}, {"stop": ["a", "th"]}, {"logprobs": 3}, {"echo": True, "logprobs": 1}, {"temperature": 0}])
    kind = rng.choice(["whole", "whole", "streamed", "streamed", "left", "long", "many", "bad", "garbage"])
    if kind == "bad":
        body |= rng.choice([{"max_tokens": 900}, {"prompt": "€"}, {"temperature": "hot"}, {"n": 99}, {"prompt": []}])
    elif kind == "long":
        body["max_tokens"] = 128 - len(prompt)
    elif kind == "many":
        body |= {"prompt": [prompt[:9]] * 4, "n": 8, "max_tokens": 4}
    elif kind == "garbage":
        return str(client.post("/v1/completions", content=rng.randbytes(rng.randint(0, 300))).status_code)
    if kind in ("whole", "long", "many", "bad"):
        return str(client.post("/v1/completions", json=body).status_code)
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if kind == "left" and len(lines) > 4:
                return "left"
        return "streamed" if "data: [DONE]" in lines else "cut"


def resident() -> float:
    """Megabytes of memory that this process occupies."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6


if __name__ == "__main__":
    main()
