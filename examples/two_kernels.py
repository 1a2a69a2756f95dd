"""Two kernels in a model of your own: causal attention, and head + loss without the logits in memory.

    python examples/two_kernels.py --steps 50

The lines are marked; the rest is PyTorch. The same model in PyTorch alone stands beside it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gptfast

VOCAB, WIDTH, HEADS, LENGTH = 256, 64, 4, 64


class Mine(nn.Module):
    """A model of one block. ours: with gptfast's kernels."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.ours = ours
        self.embedding, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.head = gptfast.nn.LinearCrossEntropyLoss(WIDTH, VOCAB)  # 1: a linear layer and its loss as one module

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        if self.ours:
            mixed = gptfast.ops.causal_attention(q, k, v)  # 2: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = (x + mixed.transpose(1, 2).flatten(2)).flatten(0, 1)
        if self.ours:
            return self.head(x, targets.flatten())
        return F.cross_entropy(self.head.linear(x), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    torch.manual_seed(0)
    ours, theirs = Mine(True), Mine(False)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(VOCAB, (8, LENGTH + 1)) // 8  # few kinds, so that there is something to learn
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (ours, theirs)]
    for step in range(given.steps):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if step % 10 == 0 or step == given.steps - 1:
            print(f"step {step}: loss {losses[0]:.5f} with the kernels, {losses[1]:.5f} in PyTorch")
    assert abs(losses[0] - losses[1]) < 1e-2, "the two models learn the same"


if __name__ == "__main__":
    main()
