"""A small model, examples of two kinds of sentences, and `gptfast finetune` in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from gptfast import GPT, GPTConfig
from gptfast.tokenizer import BPETokenizer
from tests.support.train_command import gptfast

PETS = [
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "and",
    "the",
    "dog",
    "sat",
    "on",
    "the",
    "log",
    "while",
    "a",
    "bird",
    "sang",
]
WARS = ["king", "crown", "war", "sword", "battle", "army", "lord", "blood", "castle", "throne", "of", "the"]
SMALL = ["--threads", "1", "--dtype", "float32", "--device", "cpu"]


def sentence(kind: int, draw: random.Random) -> str:
    return " ".join(draw.choice((PETS, WARS)[kind]) for _ in range(draw.randint(4, 12)))


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(task: str, n: int, seed: int) -> list[dict]:
    draw, made = random.Random(seed), []
    for i in range(n):
        kind = i % 2
        a, b = sentence(kind, draw), sentence(draw.randrange(2), draw)
        made.append(
            {
                "classification": {"text": a, "label": ["pet", "war"][kind]},
                "entailment": {"premise": a, "hypothesis": b, "label": ["neutral", "entailment"][kind]},
                "similarity": {"text1": a, "text2": b, "score": float(kind)},
                "choice": {"context": a, "choices": [sentence(0, draw), sentence(1, draw)], "label": kind},
                "lm": {"text": a},
                "chat": {"prompt": a, "response": b},
            }[task]
        )
    return made


def base(folder: Path, seed: int = 0, **options) -> Path:
    """A model with dropout, and its tokenizer."""
    draw = random.Random(0)
    tokenizer = BPETokenizer.train(" ".join(sentence(i % 2, draw) for i in range(200)), 380)
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.1, **options}
    GPT(GPTConfig(**shape, vocab_size=tokenizer.vocab_size)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def files(folder: Path, task: str = "classification", n: int = 40) -> list[str | Path]:
    """A model and examples, as options."""
    train, held = (write(folder / f"{task}-{k}.jsonl", records(task, m, k)) for k, m in ((0, n), (1, 16)))
    model = folder / "base"
    if not model.exists():
        base(model)
    return ["--model", model, "--data", train, "--eval-data", held, "--task", task]


def finetune(folder: Path, *more: str | Path, task: str = "classification", out: str = "out") -> int:
    steps = [
        "--batch-size",
        "4",
        "--max-steps",
        "8",
        "--eval-every",
        "2",
        "--log-every",
        "1",
        "--learning-rate",
        "1e-2",
    ]
    return gptfast("finetune", *files(folder, task), *SMALL, *steps, "--out", folder / out, *more)


def result(folder: Path, out: str = "out") -> dict:
    return json.loads((folder / out / "metrics.json").read_text())
