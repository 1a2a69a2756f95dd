"""Long context: teach a small GPT to find a pass key in a text, extend its context, and see at which lengths it still finds it.

    python examples/needle.py --out runs/needle

Rows of 128 tokens tell of grass and the sky; somewhere in them is a pass key of five digits, and their end asks for it. Then the
context becomes 512: without scaling, by position interpolation and by YaRN, and after a few steps on such rows. needle.png shows
how often keys are found by length and depth. For models of your own: `gptfast train --extend-context`, `gptfast evaluate --needle`.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch

from gptfast import GPT, GPTConfig
from gptfast.evaluation import needle_test
from gptfast.evaluation.needle import HAYSTACK, NEEDLE, QUESTION, plot_needles
from gptfast.tokenizer import Tokenizer, get_tokenizer

SHORT, LONG = 128, 512  # tokens: of the training, and of the longer context
SENTENCES = [f"{sentence}." for sentence in HAYSTACK.strip().rstrip(".").split(". ")]
VOCABULARY = 330  # 256 bytes, and the words of these texts


def text_with_key(draw: random.Random, sentences: int) -> str:
    """Sentences in any order, the key among them and asked for at the end."""
    key, hay = "".join(draw.choices("0123456789", k=5)), draw.choices(SENTENCES, k=sentences)
    at = draw.randint(0, sentences)
    return f"{' '.join(hay[:at])}{NEEDLE.format(key=key)}{' '.join(hay[at:])}{QUESTION} {key}"


def rows(draw: random.Random, tokenizer: Tokenizer, n: int, tokens: int) -> torch.Tensor:
    """(n, tokens + 1) ids: texts that end with the answer, behind what is left of others."""
    found = []
    while len(found) < n:
        ids = tokenizer.encode(text_with_key(draw, draw.randint(tokens // 16, tokens // 6)))
        if len(ids) <= tokens + 1:
            before = tokenizer.encode(" ".join(draw.choices(SENTENCES, k=tokens // 4)))
            found.append([*before, *ids][-tokens - 1 :])
    return torch.tensor(found)


def train(model: GPT, draw: random.Random, tokenizer: Tokenizer, steps: int, batch: int, rate: float) -> None:
    """On new rows at each step, as long as the model's context."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    start = time.process_time()
    for step in range(1, steps + 1):
        ids = rows(draw, tokenizer, batch, model.config.block_size)
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.process_time() - start:.0f} CPU seconds", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/needle"))
    parser.add_argument(
        "--steps", type=int, default=800, help="on rows of 128 tokens; an eighth as many follow on rows of 512"
    )
    parser.add_argument("--batch-size", type=int, default=24, help="rows of a step; a third as many of 512 tokens")
    parser.add_argument("--trials", type=int, default=10, help="keys at each length and depth")
    given = parser.parse_args()
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = get_tokenizer("bpe", "\n".join(text_with_key(draw, 12) for _ in range(1000)), VOCABULARY)
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 96, "block_size": SHORT, "dropout": 0.0}
    model = GPT(GPTConfig(**shape, vocab_size=tokenizer.vocab_size, position_embedding="rotary"))
    train(model, draw, tokenizer, given.steps, given.batch_size, 3e-3)
    model.save_pretrained(given.out / "short")
    tokenizer.save(given.out / "short")

    def longer(**how: Any) -> GPT:
        return GPT.from_pretrained(given.out / "short", **how).eval()

    models = {
        f"trained on {SHORT}": model,
        f"{LONG}, not scaled": longer(block_size=LONG),
        "interpolated": longer(extend_context=LONG, rope_scaling="linear"),
        "YaRN": longer(extend_context=LONG, rope_scaling="yarn"),
    }
    trained = longer(extend_context=LONG, rope_scaling="yarn")
    train(trained, draw, tokenizer, max(1, given.steps // 8), max(1, given.batch_size // 3), 1e-3)
    trained.save_pretrained(given.out / "long")
    tokenizer.save(given.out / "long")
    models["YaRN, trained on"] = trained
    needles = {}
    for name, one in models.items():
        lengths = [n for n in (64, SHORT, 256, LONG) if n <= one.config.block_size]
        needles[name] = needle_test(one, tokenizer, lengths=lengths, depths=5, trials=given.trials)
        found = zip(lengths, needles[name]["found"], strict=True)
        print(f"{name:18} found", ", ".join(f"{sum(row) / len(row):.0%} in {n} tokens" for n, row in found), flush=True)
    plot_needles(needles, given.out / "needle.png")


if __name__ == "__main__":
    main()
