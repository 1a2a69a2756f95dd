"""The program of `make demo-finetune`: pre-train a small GPT on half of Shakespeare, then tell the genre of passages from plays
that it has never seen, by each method of fine-tuning.

The learning rate of a method and the step that is kept are chosen on passages of VALIDATION. The figures are those of passages
of HELD_OUT, which decide nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from gptfast._busy import CpuWait, busy_line
from gptfast._files import atomic_write
from gptfast.data.corpus import GENRES, load_documents
from gptfast.data.documents import Document
from gptfast.openmp import bound_spinning

OUT = Path("runs/demo-finetune")
HELD_OUT = {  # works that neither pre-training nor fine-tuning sees, and that decide nothing
    "comedy": ("as_you_like_it", "tempest", "twelfth_night"),
    "history": ("henry_v", "richard_ii"),
    "tragedy": ("macbeth", "othello", "timon_of_athens"),
    "poetry": ("passionate_pilgrim", "phoenix_and_the_turtle"),
}
VALIDATION = {  # works that nothing is learnt from, and by which learning rates and steps are chosen
    "comedy": ("measure_for_measure", "two_gentlemen_of_verona"),
    "history": ("henry_vi_part_1", "john"),
    "tragedy": ("coriolanus", "romeo_and_juliet"),
    "poetry": ("lovers_complaint",),
}
PARTS = {"train": 1600, "valid": 240, "test": 400}  # passages
CHARACTERS = 240  # of a passage at most
PRETRAIN = [
    *("--tokenizer", "bpe", "--vocab-size", "1024", "--block-size", "96", "--n-layer", "2", "--n-head", "2"),
    *("--n-embd", "64", "--batch-size", "16", "--optimizer", "muon", "--learning-rate", "5e-3", "--max-steps", "250"),
    *("--eval-every", "250", "--eval-batches", "8", "--dtype", "float32"),
]
FINETUNE = [
    *("--task", "classification", "--max-steps", "300", "--batch-size", "16", "--eval-every", "50"),
    *("--dtype", "float32"),
]
PROMPT = ("--num-virtual-tokens", "8")  # of method prompt: more of them leave the passages less room
RATES = {  # learning rates that are tried; the first is the better one on the validation passages of docs/finetuning.md
    "full": ("2e-3", "1e-3"),
    "lora": ("5e-3", "1e-2"),
    "qlora": ("5e-3", "1e-2"),
    "prompt": ("3e-2", "1e-2"),
}
SEEDS = (0, 1, 2)


def main() -> int:
    """Prepare, pre-train, fine-tune by each method, compare; returns the exit code."""
    bound_spinning()
    waiting = CpuWait()
    write_files(OUT)
    code = run(pretraining(OUT))
    rows = []
    for method, rates in RATES.items():
        code = code or try_rates(OUT, method, rates)
        if code:
            return code
        rows.append(results_of(OUT, method))
    atomic_write(OUT / "results.json", (json.dumps(rows, indent=2) + "\n").encode())
    print_table(OUT, rows)
    busy = busy_line(waiting.share())
    print(f"\nconfusion   {OUT}/*/*/confusion.png\ncurves      {OUT}/*/*/loss.png" + (f"\n\n{busy}" if busy else ""))
    return 0


def run(command: Sequence[str]) -> int:
    print(f"\n$ gptfast {' '.join(command)}\n", flush=True)
    return subprocess.run([sys.executable, "-m", "gptfast", *command], check=False).returncode


def pretraining(out: Path) -> list[str]:
    """The command that pre-trains, without "gptfast"."""
    return ["train", "--data", str(out / "half"), "--out", str(out / "base"), "--overwrite", *PRETRAIN]


def finetuning(out: Path, method: str, rate: str, seed: int) -> list[str]:
    """The command that fine-tunes, without "gptfast"; the validation passages choose the step."""
    files = ("--data", str(out / "train.jsonl"), "--eval-data", str(out / "valid.jsonl"))
    place = ("--out", str(folder_of(out, method, rate, seed)), "--overwrite")
    how = ("--method", method, *(PROMPT if method == "prompt" else ()), "--learning-rate", rate, "--seed", str(seed))
    return ["finetune", "--model", str(out / "base" / "best"), *files, *FINETUNE, *how, *place]


def folder_of(out: Path, method: str, rate: str, seed: int) -> Path:
    return out / method / f"rate-{rate}-seed-{seed}"


def try_rates(out: Path, method: str, rates: Sequence[str]) -> int:
    """Fine-tune with each rate and the first seed, and with the rate that is best on the validation passages and the other
    seeds; returns the exit code."""
    for rate in rates:
        if code := run(finetuning(out, method, rate, SEEDS[0])):
            return code
    rate = best_rate(out, method)
    return next((code for seed in SEEDS[1:] if (code := run(finetuning(out, method, rate, seed)))), 0)


def best_rate(out: Path, method: str) -> str:
    return max(RATES[method], key=lambda rate: figures(folder_of(out, method, rate, SEEDS[0]))["value"])


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def results_of(out: Path, method: str) -> dict[str, Any]:
    """What a method reached with its best rate, a value a seed."""
    rate = best_rate(out, method)
    folders = [folder_of(out, method, rate, seed) for seed in SEEDS]
    found = [figures(folder) for folder in folders]
    return {
        "method": method,
        "learning_rate": rate,
        "validation": [f["value"] for f in found],
        "accuracy": [judged(folder, out / "test.jsonl", method) for folder in folders],
        **{key: found[0][key] for key in ("trainable_parameters", "peak_memory", "seconds")},
    }


def judged(folder: Path, file: Path, method: str) -> float:
    """The accuracy of a run's best step on the passages of a file."""
    from gptfast.finetuning import TaskModel, metrics

    packed: dict[str, Any] = {"quantize": "nf4", "double_quant": True} if method == "qlora" else {}
    model = TaskModel.from_pretrained(folder / "best", **packed)
    passages = read(file)
    said = model.predict([p["text"] for p in passages])
    return metrics.accuracy([p["label"] for p in passages], [one["label"] for one in said])


def majority(out: Path) -> float:
    """The accuracy on the unseen passages of saying what is most frequent among the training ones."""
    most = Counter(p["label"] for p in read(out / "train.jsonl")).most_common(1)[0][0]
    return mean(p["label"] == most for p in read(out / "test.jsonl"))


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def print_table(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Print what the methods reached."""
    names = ("learning rate", "accuracy", "of the seeds", "trained parameters", "peak memory", "seconds")
    widths = (15, 10, 21, 20, 13, 9)
    print(f"\n{'method':<14}" + "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
    print(f"{'most frequent':<14}{'':>15}{majority(out):>10.3f}")
    for r in rows:
        seeds = " ".join(f"{x:.3f}" for x in r["accuracy"])
        memory = f"{(r['peak_memory'] or 0) / 2**20:,.0f} MiB"
        figures = (r["learning_rate"], f"{mean(r['accuracy']):.3f}", seeds, f"{r['trainable_parameters']:,}")
        cells = (*figures, memory, f"{r['seconds']:.0f}")
        print(f"{r['method']:<14}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))


def write_files(out: Path, parts: dict[str, int] = PARTS, characters: int = CHARACTERS) -> None:
    """Write the texts to pre-train on, out/half/*.txt, and passages with their genre: out/train.jsonl, valid.jsonl, test.jsonl.

    Args:
        out: a folder.
        parts: number of passages of train, valid and test, taken evenly from all.
        characters: of a passage, at most.
    """
    works = {genre: load_documents(f"shakespeare:{genre}") for genre in GENRES}
    named = {"valid": VALIDATION, "test": HELD_OUT}
    split = {part: {g: [d for d in works[g] if d.name in of[g]] for g in GENRES} for part, of in named.items()}
    split["train"] = {g: [d for d in works[g] if d.name not in (*VALIDATION[g], *HELD_OUT[g])] for g in GENRES}
    half = out / "half"
    half.mkdir(parents=True, exist_ok=True)
    chosen = [d for found in split["train"].values() for n, d in enumerate(found) if n % 3 != 2]  # half of all text
    for document in chosen:
        (half / f"{document.name}.txt").write_text(document.text, encoding="utf-8")
    size, total = (sum(d.size for d in found) for found in (chosen, [d for found in works.values() for d in found]))
    print(f"pre-training on {len(chosen)} works, {size / total:.0%} of the text")
    for what, of in (("the steps and rates are chosen by", VALIDATION), ("the methods are judged by", HELD_OUT)):
        print(f"{what}: {', '.join(name for names in of.values() for name in names)}")
    for name, n in parts.items():
        found = [(text, genre) for genre, part in split[name].items() for d in part for text in passages(d, characters)]
        taken = [found[i * len(found) // min(n, len(found))] for i in range(min(n, len(found)))]
        lines = (json.dumps({"text": text, "label": genre}) + "\n" for text, genre in taken)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def passages(document: Document, characters: int) -> list[str]:
    """A work in passages of whole lines."""
    found, part = [], ""
    for line in document.text.splitlines():
        if part and len(part) + len(line) + 1 > characters:
            found.append(part)
            part = ""
        part = f"{part}\n{line}" if part else line[:characters]
    return found


if __name__ == "__main__":
    sys.exit(main())
