"""Train transformers' GPT-2 with transformers' Trainer, on gptfast's kernels.

    pip install accelerate  # which the Trainer needs
    python examples/accelerate_trainer.py README.md --steps 50

One line differs from a script without gptfast. The bytes of the text are its tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gptfast


class Windows(torch.utils.data.Dataset):
    """The bytes of a text, T at a time, as ids and labels."""

    def __init__(self, text: bytes, T: int) -> None:
        self.ids, self.T = torch.tensor(list(text)), T

    def __len__(self) -> int:
        return len(self.ids) // self.T

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids = self.ids[n * self.T : (n + 1) * self.T]
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=128, n_embd=128, n_layer=4, n_head=4))
    print(gptfast.accelerate(model))  # the line
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=given.steps,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Windows(given.text.read_bytes(), 128)).train()


if __name__ == "__main__":
    main()
