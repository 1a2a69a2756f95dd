"""The program of `make demo-finetune`: pre-train a small GPT on half of Shakespeare, then tell the genre of passages from plays
that it has never seen, by each method of fine-tuning."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gptfast._busy import CpuWait, busy_line
from gptfast.data.documents import GENRES, Document, load_documents
from gptfast.openmp import bound_spinning

OUT = Path("runs/demo-finetune")
HELD_OUT = {  # works that neither pre-training nor fine-tuning sees
    "comedy": ("as_you_like_it", "tempest", "twelfth_night"),
    "history": ("henry_v", "richard_ii"),
    "tragedy": ("macbeth", "othello", "timon_of_athens"),
    "poetry": ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle"),
}
TRAIN, TEST = 1600, 400  # passages
CHARACTERS = 240  # of a passage at most
PRETRAIN = [
    *("--tokenizer", "bpe", "--vocab-size", "1024", "--block-size", "96", "--n-layer", "2", "--n-head", "2"),
    *("--n-embd", "64", "--batch-size", "16", "--optimizer", "muon", "--learning-rate", "5e-3", "--max-steps", "250"),
    *("--eval-every", "250", "--eval-batches", "8", "--dtype", "float32"),
]
FINETUNE = [
    *("--task", "classification", "--max-steps", "300", "--batch-size", "16", "--eval-every", "100"),
    *("--dtype", "float32"),
]
RATES = {"full": "2e-3", "lora": "1e-2"}  # the methods, and their learning rates


def main() -> int:
    """Prepare, pre-train, fine-tune by each method, compare; returns the exit code."""
    bound_spinning()
    waiting = CpuWait()
    write_files(OUT)
    for command in commands(OUT):
        print(f"\n$ gptfast {' '.join(command)}\n", flush=True)
        code = subprocess.run([sys.executable, "-m", "gptfast", *command], check=False).returncode
        if code:
            return code
    print_table(OUT)
    busy = busy_line(waiting.share())
    print(f"\nconfusion   {OUT}/*/confusion.png\ncurves      {OUT}/*/loss.png" + (f"\n\n{busy}" if busy else ""))
    return 0


def commands(out: Path, pretrain: Sequence[str] = PRETRAIN, finetune: Sequence[str] = FINETUNE) -> list[list[str]]:
    """The commands of the demonstration, without "gptfast": pre-training, and fine-tuning by each method."""
    base, files = str(out / "base"), ("--data", str(out / "train.jsonl"), "--eval-data", str(out / "test.jsonl"))
    given = ("--model", f"{base}/best", *files, *finetune)
    return [
        ["train", "--data", str(out / "half"), "--out", base, "--overwrite", *pretrain],
        *(
            ["finetune", *given, "--method", method, "--learning-rate", rate, "--out", str(out / method), "--overwrite"]
            for method, rate in RATES.items()
        ),
    ]


def print_table(out: Path) -> None:
    """Print what the methods reached."""
    found = [json.loads((out / method / "metrics.json").read_text(encoding="utf-8")) for method in RATES]
    print(f"\n{'method':<14}{'accuracy':>9}{'trained parameters':>20}{'peak memory':>13}{'seconds':>9}")
    print(f"{'most frequent':<14}{found[0]['baseline']:>9.3f}")
    for r in found:
        memory = f"{(r['peak_memory'] or 0) / 2**20:,.0f} MiB"
        print(f"{r['method']:<14}{r['value']:>9.3f}{r['trainable_parameters']:>20,}{memory:>13}{r['seconds']:>9.0f}")


def write_files(out: Path, train: int = TRAIN, test: int = TEST, characters: int = CHARACTERS) -> None:
    """Write the texts to pre-train on, out/half/*.txt, and passages with their genre, out/train.jsonl and out/test.jsonl.

    Args:
        out: a folder.
        train, test: number of passages, taken evenly from all.
        characters: of a passage, at most.
    """
    works = {genre: load_documents(f"shakespeare:{genre}") for genre in GENRES}
    seen = {genre: [d for d in found if d.name not in HELD_OUT[genre]] for genre, found in works.items()}
    unseen = {genre: [d for d in found if d.name in HELD_OUT[genre]] for genre, found in works.items()}
    half = out / "half"
    half.mkdir(parents=True, exist_ok=True)
    chosen = [d for found in seen.values() for n, d in enumerate(found) if n % 3 != 2]  # two of three: half of all text
    for document in chosen:
        (half / f"{document.name}.txt").write_text(document.text, encoding="utf-8")
    size, total = (sum(d.size for d in found) for found in (chosen, [d for found in works.values() for d in found]))
    print(
        f"pre-training on {len(chosen)} works, {size / total:.0%} of the text; none of these is among the unseen ones:"
    )
    print("  " + ", ".join(name for names in HELD_OUT.values() for name in names))
    for name, parts, n in (("train", seen, train), ("test", unseen, test)):
        found = [(text, genre) for genre, part in parts.items() for d in part for text in passages(d, characters)]
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
