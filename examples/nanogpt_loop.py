"""A training loop in the manner of nanoGPT, with three lines changed.

    python examples/nanogpt_loop.py README.md --steps 100

The lines are marked. The bytes of the text are its tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import gptfast  # 1

BLOCK, BATCH = 128, 8


def batch(data: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.randint(len(data) - BLOCK, (BATCH,))
    x = torch.stack([data[n : n + BLOCK] for n in first])
    return x, torch.stack([data[n + 1 : n + 1 + BLOCK] for n in first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    torch.manual_seed(1337)
    data = torch.tensor(list(given.text.read_bytes()))
    config = gptfast.GPTConfig(vocab_size=256, block_size=BLOCK, n_layer=4, n_head=4, n_embd=128, dropout=0.1)  # 2
    model = gptfast.GPT(config)  # 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        x, y = batch(data)
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step + 1 == given.steps:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
