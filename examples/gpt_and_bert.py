"""GPT beside BERT: one size, one text, one tokenizer; a language model against masked tokens. docs/gpt-and-bert.md shows the result.

    python examples/gpt_and_bert.py --out runs/gpt-and-bert

Trains both on Shakespeare's plays, draws who attends to whom, asks both for words that are left out of plays that neither has
seen, in the middle of a passage and at its end, and lets both continue a text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from gptfast import BERT, GPT, GPTConfig
from gptfast.data import PreparedData, open_data
from gptfast.evaluation.inside import look_inside
from gptfast.training import TrainConfig, Trainer

PLAYS = "shakespeare:comedy,history,tragedy"  # whole plays are held out
LENGTH, CANDIDATES = 24, 100  # tokens of a passage; words that are chosen from: the commonest of the training text
SENTENCE = "the king is dead, and his son will wear the crown."
PROMPT = "my lord, the king"


def train(kind: type, config: GPTConfig, data: PreparedData, given: argparse.Namespace, **options: Any) -> Any:
    """The best checkpoint of a training on the same windows: of next tokens, or of masked ones."""
    torch.manual_seed(0)
    model, out, start = kind(config), given.out / kind.__name__.lower(), time.process_time()
    for matrix in (p for p in model.parameters() if p.dim() == 2):
        matrix.data *= (768 / given.width) ** 0.5  # a deviation of 0.02 is for 768 channels
    shared = {"batch_size": 32, "max_steps": given.steps, "warmup_steps": given.steps // 10, "eval_batches": 40}
    shared |= {"optimizer": "muon", "learning_rate": 4e-3, "min_lr": 1e-5, "eval_every": max(1, given.steps // 4)}
    recipe = TrainConfig(**shared, **options)
    found = Trainer(model, data.train, data.val, recipe, out, tokenizer=data.tokenizer, overwrite=True).train()
    size, seconds = model.num_parameters() / 1e6, time.process_time() - start
    print(f"{kind.__name__}: {size:.2f}M parameters, {seconds:.0f} CPU s, held-out loss {found.best_val_loss:.3f} nats")
    return kind.from_pretrained(out / "best").eval()


def passages(data: PreparedData, words: list[int], place: int, n: int) -> np.ndarray:
    """(n, LENGTH) ids of the held-out plays, with one of the words at a place, that their text gives again."""
    text, found, draws = data.val.take(np.arange(len(data.val))).astype(np.int64), [], np.random.default_rng(0)
    for at in draws.permutation(np.flatnonzero(np.isin(text[LENGTH:-LENGTH], words)) + LENGTH):
        row = text[at - place : at - place + LENGTH]
        parts = (row, row[:place], row[place + 1 :])  # the word is whole, and so are the ends
        if all(data.tokenizer.encode(data.tokenizer.decode(part)) == part.tolist() for part in parts):
            found.append(row)
        if len(found) == n:
            break
    return np.array(found)


@torch.inference_mode()
def gpt_guesses(gpt: GPT, rows: np.ndarray, place: int, words: list[int], whole: bool) -> list[int]:
    """The likeliest word: behind what stands to its left, or of the whole passages with each word in them."""
    if not whole:
        logits = gpt(torch.from_numpy(rows[:, :place]), last_only=True)
        return [words[n] for n in logits[:, words].argmax(-1)]
    found = []
    for row in torch.from_numpy(rows):
        tried = row.repeat(len(words), 1)
        tried[:, place] = torch.tensor(words)
        logprobs = gpt(tried)[:, place - 1 : -1].log_softmax(-1)  # of the word and all that follows
        total = logprobs.gather(-1, tried[:, place:, None]).sum((1, 2))
        found.append(words[int(total.argmax())])
    return found


def bert_guesses(bert: BERT, rows: np.ndarray, place: int, words: list[int], data: PreparedData) -> list[int]:
    say = data.tokenizer.decode
    texts = [f"{say(row[:place])} [MASK] {say(row[place + 1 :])}" for row in rows]
    answers = bert.fill_mask(texts, targets=[say([word]) for word in words], top_k=1, tokenizer=data.tokenizer)
    return [answer[0]["token"] for answer in answers]


def cloze(gpt: GPT, bert: BERT, data: PreparedData, given: argparse.Namespace) -> None:
    """Shares of the words that are found, by where they stand and who is asked."""
    tokens, unseen = (part.take(np.arange(len(part))) for part in (data.train, data.val))
    names = [data.tokenizer.decode([n]) for n in range(data.tokenizer.vocab_size)]
    counts = np.bincount(tokens, minlength=len(names)) + 0.5
    nats, right = -np.log(counts / counts.sum())[unseen].mean(), np.mean(unseen == counts.argmax())
    print(f"a token guessed by its frequency: {nats:.3f} nats, {right:.1%} right")
    counts *= [name.isalpha() and len(name) > 1 for name in names]
    words = np.argsort(-counts, kind="stable")[:CANDIDATES].tolist()
    for where, place in (("in the middle", LENGTH // 2), ("at the end", LENGTH - 1)):
        rows = passages(data, words, place, given.passages)
        guesses = {
            "BERT, both sides": bert_guesses(bert, rows, place, words, data),
            "GPT, the left side": gpt_guesses(gpt, rows, place, words, whole=False),
            "GPT, whole passages": gpt_guesses(gpt, rows, place, words, whole=True),
            f"always '{names[words[0]]}'": [words[0]] * len(rows),
        }
        print(f"\na word {where} of {LENGTH} tokens, one of {CANDIDATES}; {len(rows)} passages")
        for name, guess in guesses.items():
            share = float(np.mean(rows[:, place] == guess))
            print(f"  {name:22} {share:6.1%} ± {1.96 * (share * (1 - share) / len(rows)) ** 0.5:.1%}")
        for row, *three in list(zip(rows, *list(guesses.values())[:3], strict=True))[:3]:
            left, word, right = (data.tokenizer.decode(part) for part in np.split(row, [place, place + 1]))
            said = ", ".join(names[guess] for guess in three)
            print(f"  … {left[-40:]} [{word}] {right[:40]} …  BERT, GPT left, GPT whole: {said}")


def draw(gpt: GPT, bert: BERT, tokenizer: Any, out: Path) -> None:
    ids = tokenizer.encode(SENTENCE)
    ends = [tokenizer.special_id(role) for role in ("cls_token", "sep_token")]
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    for axis, model, row in zip(figure.subplots(1, 2), (gpt, bert), (ids, [ends[0], *ids, ends[1]]), strict=True):
        weights, labels = look_inside(model, row).attention.mean((0, 1)), [tokenizer.decode([n]) for n in row]
        shown = axis.imshow(weights, cmap="Blues", vmin=0, vmax=0.4)
        axis.set_xticks(range(len(row)), labels, rotation=90)
        axis.set_yticks(range(len(row)), labels)
        axis.set(title=type(model).__name__, xlabel="what is looked at", ylabel="who looks")
    figure.colorbar(shown, ax=figure.axes, label="weight, mean of heads and layers", shrink=0.8)
    figure.savefig(out / "who-attends.png", dpi=100)


def continue_text(gpt: GPT, bert: BERT, tokenizer: Any) -> None:
    ids, text = tokenizer.encode(PROMPT), PROMPT
    [more] = gpt.generate([ids], max_new_tokens=24, temperature=0.8, top_k=50, seed=0)
    for _ in range(12):  # a mask at the end, again and again
        text = f"{text} {bert.fill_mask(f'{text} [MASK]', tokenizer=tokenizer, top_k=1)[0]['token_str']}"
    print(f"\nGPT continues: {tokenizer.decode([*ids, *more])}\nBERT continues: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt-and-bert"))
    parser.add_argument("--steps", type=int, default=3000, help="of each training, of 32 rows of 32 tokens")
    parser.add_argument("--width", type=int, default=96, help="channels of both models")
    parser.add_argument("--passages", type=int, default=300, help="of each cloze")
    given = parser.parse_args()
    data = open_data(PLAYS, given.out / "data", "wordpiece", vocab_size=1024, progress=False)
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": given.width, "block_size": 32, "dropout": 0.0}
    shape["vocab_size"] = data.tokenizer.vocab_size
    both_ways = GPTConfig.preset("bert-base", **shape, next_sentence_head=False, pooler=False)
    bert = train(BERT, both_ways, data, given, objective="mlm", no_next_sentence=True)
    gpt = train(GPT, GPTConfig(**shape), data, given)
    draw(gpt, bert, data.tokenizer, given.out)
    cloze(gpt, bert, data, given)
    continue_text(gpt, bert, data.tokenizer)


if __name__ == "__main__":
    main()
