"""Fine-tune a classifier from a GPT, by LoRA, and ask it. The command does the same: gptfast finetune.

    python examples/classifier.py runs/bard/best reviews.jsonl --out runs/reviews

A line of reviews.jsonl: {"text": "I would see it again.", "label": "good"}
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gptfast.finetuning import TaskModel, finetune, read_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    parser.add_argument("data", type=Path, help="JSON Lines, CSV or Parquet with text and label")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/classifier"))
    given = parser.parse_args()

    examples = read_examples(given.data, "classification")  # a bad line is named by its number
    print(f"{len(examples)} examples, labels {', '.join(examples.labels())}")
    result = finetune(
        given.model,
        given.data,
        "classification",
        method="lora",
        out=given.out,
        max_steps=given.steps,
        batch_size=4,
        seed=0,
    )
    print(f"{result.metric} {result.value} on held-out examples; always the most frequent class: {result.baseline}")
    print(f"{result.trainable_parameters:,} parameters trained in {result.steps} steps, {result.seconds:.1f} s")

    model = TaskModel.from_pretrained(given.out / "best")
    for example in examples.records[:3]:
        [found] = model.predict([example["text"]])
        likely = found["probabilities"]
        print(f"{example['text'][:40]!r}: {found['label']} (expected {example['label']}), {likely}")


if __name__ == "__main__":
    main()
