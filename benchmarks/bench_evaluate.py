"""Speed of lm-evaluation-harness with --model gptfast beside --model hf: GPT-2 124M's shape, fp32, random weights.

    python benchmarks/bench_evaluate.py [--rounds 3] [--items 8] [--cpu-time]

multiple_choice: a question of some 60 tokens with four choices of 4 to 8. cloze: a passage of some 80 tokens and its last word.
few_shot: eight questions that share 300 tokens of solved ones. Each round runs both models on the same requests, in turns; the
ratio is the median over the rounds. --cpu-time counts the process's own CPU seconds, for a machine that others use too. Rows go
to the terminal and, as JSON, to --out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import gptfast
from gptfast.evaluation.harness_model import GPTFastLM
from gptfast.machine import cpu_name
from gptfast.tokenizer import get_tokenizer

WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "life",
    "child",
    "world",
    "school",
    "state",
    "group",
    "country",
)
TOLERANCE = 1e-3  # both sum some -11 a token in fp32


def text(words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def requests_of(items: int) -> dict[str, list[tuple[str, str]]]:
    """Pairs of context and continuation of each kind of task."""
    questions = [f"Question: {text(55, n)}?\nAnswer:" for n in range(items)]
    choices = [[" " + text(4 + k, 100 * n + k) for k in (0, 1, 2, 4)] for n in range(items)]
    shots = "\n\n".join(f"{text(50, 1000 + n)}? {text(5, 2000 + n)}" for n in range(5)) + "\n\n"
    pairs = [(q, c) for q, each in zip(questions, choices, strict=True) for c in each]
    return {
        "multiple_choice": pairs,
        "cloze": [(text(80, 300 + n), " " + text(1, 400 + n)) for n in range(4 * items)],
        "few_shot": [(shots + question, choice) for question, choice in pairs],
    }


def checkpoint(folder: str, layers: int) -> str:
    torch.manual_seed(0)
    gptfast.GPT(gptfast.GPTConfig.preset("gpt2", n_layer=layers)).save_pretrained(folder)
    get_tokenizer("gpt2").save(folder)
    return folder


def run(model: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    asked = [Instance("loglikelihood", {}, pair, n, ("bench", n, 1)) for n, pair in enumerate(pairs)]
    return model.loglikelihood(asked, disable_tqdm=True)


def measure(
    options: argparse.Namespace, models: dict[str, Any], kind: str, pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in models}
    found: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name, model in models.items():
            start = options.clock()
            found[name] = run(model, pairs)
            times[name].append(options.clock() - start)
    far = max(abs(a[0] - b[0]) for a, b in zip(found["gptfast"], found["hf"], strict=True))
    if far > TOLERANCE:
        raise SystemExit(f"{kind}: the scores of the two models differ by {far}")
    each = {f"{name}_per_second": round(len(pairs) / statistics.median(taken), 2) for name, taken in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["hf"], times["gptfast"], strict=True))
    return {"kind": kind, "requests": len(pairs), **each, "times_hf": round(ratio, 2), "error": round(far, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-time", dest="clock", action="store_const", const=time.process_time)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench/evaluate.jsonl"), help="a JSON value a row, appended"
    )
    parser.add_argument("--kinds", default="multiple_choice,cloze,few_shot")
    for name, value in {"rounds": 3, "items": 8, "layers": 12, "batch": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    options.clock = options.clock or time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint(folder, options.layers)
        models = {
            "hf": HFLM(path, dtype="float32", device="cpu", batch_size=options.batch),
            "gptfast": GPTFastLM(path, "float32", batch_size=options.batch),
        }
    head = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "layers": options.layers, "batch": options.batch}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as out:
        for kind, pairs in requests_of(options.items).items():
            if kind in options.kinds.split(","):
                row = measure(options, models, kind, pairs)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                out.write(json.dumps({**row, **head}) + "\n")


if __name__ == "__main__":
    main()
