"""Train a small GPT on your own text, from Python, and let it continue a line. The command does the same: gptfast train.

python examples/own_text.py README.md --steps 200 --out runs/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import gptfast
from gptfast.tokenizer import CharTokenizer, load_tokenizer
from gptfast.training import TrainConfig, Trainer

BLOCK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    given = parser.parse_args()

    text = given.text.read_text(encoding="utf-8")
    tokenizer = CharTokenizer.train(text)  # get_tokenizer("bpe", text) learns subwords
    tokens = np.array(tokenizer.encode(text))
    held_out = len(tokens) // 10  # the end of the text tells how well it predicts what it has not seen
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": BLOCK}
    model = gptfast.GPT(gptfast.GPTConfig(vocab_size=tokenizer.vocab_size, dropout=0.1, **sizes))
    config = TrainConfig(max_steps=given.steps, batch_size=8, eval_every=max(1, given.steps // 4), seed=0)
    result = Trainer(model, tokens[:-held_out], tokens[-held_out:], config, given.out, tokenizer=tokenizer).train()
    print(f"best validation loss {result.best_val_loss:.3f} nats per character, at step {result.best_step}")

    best, tokenizer = gptfast.GPT.from_pretrained(given.out / "best").eval(), load_tokenizer(given.out / "best")
    prompt = tokenizer.encode(text[:20])
    [ids] = best.generate([prompt], max_new_tokens=BLOCK - len(prompt), temperature=0.8, seed=0)
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
