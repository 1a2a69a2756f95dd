"""Local tasks for lm-evaluation-harness: multiple choice, cloze, texts to write, texts to predict. No network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from gptfast import GPT, GPTConfig
from gptfast.tokenizer import get_tokenizer

CHOICE = [
    {
        "question": f"{name} has {n} apples and buys {n + 2} more at the market. How many are there",
        "choices": [f"{n + k} of them" for k in range(3)] + ["none", " two,  or three"],
        "gold": n % 5,
    }
    for n, name in enumerate(("Ann", "Bob", "Caf\u00e9 owner Zo\u00eb", "\u6771\u4eac", "Dan", "Eve"))
]
CLOZE = [
    {"text": f"The {animal} sat on the {place} and looked at the ", "target": "moon and stars"}
    for animal, place in (("cat", "mat"), ("dog", "log"), ("owl", "roof"), ("cat", "roof"))
] + [{"text": "", "target": "Nothing before"}, {"text": "long " * 90, "target": " and longer still"}]
WRITE = [{"text": f"{word} and so on"} for word in ("One", "Two", "Ten", "long " * 80)]
READ = [{"text": "To be, or not to be: that is the question. " * n} for n in (1, 2, 9)] + [{"text": ""}]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "own_choice": (
        CHOICE,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}?\nAnswer:",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "own_cloze": (
        CLOZE,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{target}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    ),
    "own_write": (
        WRITE,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "x",
            "generation_kwargs": {"until": ["\n\n", "e"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ),
    "own_read": (
        READ,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
}


def write_tasks(folder: Path) -> Path:
    """YAML files with their JSONL, for --include_path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (rows, task) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **files, **task}), encoding="utf-8")
    return folder


def write_model(folder: Path, block_size: int = 64) -> Path:
    """A small GPT with GPT-2's tokenizer, for both models of the harness."""
    import torch

    torch.manual_seed(1)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=50257))
    for parameter in gpt.parameters():
        parameter.data *= 3  # far from uniform
    gpt.eval().save_pretrained(folder)
    get_tokenizer("gpt2").save(folder)
    return folder
