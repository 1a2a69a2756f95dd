"""Images in: teach a small GPT to caption generated scenes, such as "two red squares", from patches that are projected into it.

    python examples/image_captions.py

A scene has one to three shapes of one kind and colour, anywhere. Its patches become vectors of the model's width, which lie
before the words (`prefix_embeds`); the projection and the GPT are trained together, and `generate` reads unseen scenes.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from gptfast import GPT, GPTConfig

SIZE, PATCH, CELLS = 30, 10, 3  # pixels of an image's side and of a patch's; shapes have a cell each
COUNTS, COLOURS, SHAPES = ("one", "two", "three"), ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
WORDS = ("<start>", "<end>", *COUNTS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES))
IDS = {word: n for n, word in enumerate(WORDS)}
RGB = torch.tensor([[1.0, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 1.0], [0.9, 0.9, 0.1]])


def scenes(n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 3, SIZE, SIZE) and their captions (n, 5) with <start> and <end>."""
    count = torch.randint(len(COUNTS), (n,), generator=draws)
    colour = torch.randint(len(COLOURS), (n,), generator=draws)
    shape = torch.randint(len(SHAPES), (n,), generator=draws)
    cells = torch.rand(n, CELLS * CELLS, generator=draws).argsort(1)[:, : len(COUNTS)]  # n 3, without repeats
    corner = torch.stack((cells % CELLS, cells // CELLS), -1) * (SIZE // CELLS)
    centre = corner + SIZE / CELLS / 2 + torch.rand(n, len(COUNTS), 2, generator=draws) * 2 - 1
    radius = 2.5 + torch.rand(n, len(COUNTS), 1, 1, generator=draws)
    pixels = torch.arange(SIZE) + 0.5
    dx = pixels[None, None, None, :] - centre[..., 0, None, None]  # n 3 1 SIZE
    dy = pixels[None, None, :, None] - centre[..., 1, None, None]
    masks = torch.stack(
        (
            dx**2 + dy**2 < radius**2,
            torch.maximum(dx.abs(), dy.abs()) < 0.85 * radius,
            (dy.abs() < radius) & (dx.abs() < (dy + radius) / 2),
        )
    )
    mask = masks[shape, torch.arange(n)]  # n 3 SIZE SIZE
    mask &= (torch.arange(len(COUNTS)) <= count[:, None])[..., None, None]
    inside = mask.any(1)[:, None]  # n 1 SIZE SIZE
    background = 0.1 * torch.rand(n, 3, SIZE, SIZE, generator=draws)
    images = torch.where(inside, RGB[colour][:, :, None, None].expand_as(background), background)
    kind = IDS[SHAPES[0]] + shape + len(SHAPES) * (count > 0)  # "circle", or "circles"
    columns = (torch.zeros_like(count), IDS["one"] + count, IDS["red"] + colour, kind, torch.ones_like(count))
    return images, torch.stack(columns, 1)


class Captioner(nn.Module):
    """A GPT that reads the patches of an image before words."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        patches = (SIZE // PATCH) ** 2
        self.project = nn.Sequential(
            nn.Linear(3 * PATCH * PATCH, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )  # of a patch
        self.gpt = GPT(
            GPTConfig(n_layer=3, n_head=4, n_embd=width, block_size=patches + 8, vocab_size=len(WORDS), dropout=0.0)
        )

    def prefix(self, images: Tensor) -> Tensor:
        """(B, patches, width)."""
        patches = nn.functional.unfold(images, PATCH, stride=PATCH)  # B 3*PATCH*PATCH patches
        return self.project(patches.transpose(1, 2))

    def loss(self, images: Tensor, captions: Tensor) -> Tensor:
        targets = nn.functional.pad(captions[:, 1:], (0, 1), value=-100)
        return self.gpt(captions, targets, prefix_embeds=self.prefix(images))[1]

    @torch.inference_mode()
    def caption(self, images: Tensor) -> list[str]:
        start = torch.full((len(images), 1), IDS["<start>"])
        found = self.gpt.generate(start, prefix_embeds=self.prefix(images), max_new_tokens=4, eos_token_id=IDS["<end>"])
        return [words(row) for row in found.tolist()]


def words(ids: list[int]) -> str:
    ends = (IDS["<start>"], IDS["<end>"])
    return " ".join(WORDS[n] for n in ids if n not in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--batch-size", type=int, default=64, help="scenes of a step, each seen once")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    torch.manual_seed(given.seed)
    draws, start = torch.Generator().manual_seed(given.seed), time.perf_counter()
    model = Captioner()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=given.steps, pct_start=0.05)
    for step in range(given.steps):
        loss = model.loss(*scenes(given.batch_size, draws))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == given.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)

    model.eval()
    images, captions = scenes(500, torch.Generator().manual_seed(given.seed + 1))
    wanted, found = [words(row) for row in captions.tolist()], model.caption(images)
    for one, other in zip(wanted[:4], found[:4], strict=True):
        print(f"{one:22} read as {other}")
    right = sum(one == other for one, other in zip(wanted, found, strict=True))
    print(f"{right / len(wanted):.1%} of {len(wanted)} unseen scenes are captioned word for word")


if __name__ == "__main__":
    main()
