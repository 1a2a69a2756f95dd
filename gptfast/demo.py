"""The program of `make demo`: train a small GPT on Shakespeare, generate, and time its training step against PyTorch's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gptfast._busy import CpuWait, busy_line
from gptfast.openmp import bound_spinning

OUT = Path("runs/demo")
PLAYS = (
    "shakespeare:comedy,history,tragedy"  # validation holds out whole plays; poems would make it another kind of text
)
TRAIN = [
    *("--data", PLAYS, "--tokenizer", "char", "--out", str(OUT), "--overwrite"),
    *("--n-layer", "4", "--n-head", "6", "--n-embd", "192", "--block-size", "128", "--batch-size", "16"),
    *("--dropout", "0", "--optimizer", "muon", "--learning-rate", "4e-3", "--min-lr", "1e-5", "--warmup-steps", "50"),
    *("--max-minutes", "2.9", "--eval-every", "300", "--eval-batches", "32"),
]
WATCH_SECONDS = 2.0
PROMPT = "HAMLET:\n"
TEMPERATURES = (0.5, 0.8, 1.0)


def main() -> int:
    """Train, generate, compare; returns the exit code."""
    bound_spinning()
    print(f"$ gptfast train {' '.join(TRAIN)}\n", flush=True)
    code, waiting = train([sys.executable, "-m", "gptfast", "train", *TRAIN])
    if code:
        return code
    write_samples()
    compare()
    print(f"\ncheckpoint  {OUT / 'best'}\nloss curve  {OUT / 'loss.png'}\nlog         {OUT / 'log.jsonl'}")
    print(f"generate    gptfast generate --model {OUT / 'best'} --prompt 'ROMEO:' --temperature 0.8")
    busy = busy_line(waiting)
    if busy:
        print(f"\n{busy}; the README's figures are from a quiet machine")
    return 0


def train(command: list[str]) -> tuple[int, float | None]:
    """Run the training; returns its exit code and the part of the time in which it waited for a core."""
    with subprocess.Popen(command) as process:
        watch, waiting = CpuWait(process.pid), None
        while True:
            try:
                return process.wait(WATCH_SECONDS), waiting
            except subprocess.TimeoutExpired:
                waiting = watch.share() or waiting


def write_samples() -> None:
    """Print continuations of the prompt at three temperatures."""
    from gptfast import GPT
    from gptfast.tokenizer import load_tokenizer

    model, tokenizer = GPT.from_pretrained(OUT / "best").eval(), load_tokenizer(OUT / "best")
    prompt = tokenizer.encode(PROMPT)
    length = model.config.block_size - len(prompt)
    for temperature in TEMPERATURES:
        print(f"\n---- temperature {temperature} " + "-" * 60, flush=True)
        ids = model.generate([prompt], max_new_tokens=length, temperature=temperature, seed=1)[0]
        print(tokenizer.decode(ids))


def compare() -> None:
    """Time the training step of the trained model against PyTorch's."""
    from gptfast import GPT, tune_malloc
    from gptfast.benchmarking.training_step import compare_step

    tune_malloc()
    config = GPT.from_pretrained(OUT / "best").config
    print("\n---- speed " + "-" * 68, flush=True)
    for dtype in ("float32", "bfloat16"):
        print("\n".join(compare_step(config, batch_size=16, dtype=dtype).lines()), end="\n\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
