"""Masked rows: their form, the shares of 80, 10 and 10 percent, whole words, next sentences, and that they are functions of row and
seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptfast.data import prepare
from gptfast.data.masked import MASKING_DOMAIN, MaskedSampler, MaskTokens
from gptfast.rng import philox4x32
from gptfast.tokenizer import get_tokenizer

TEXT = "the quick brown foxes jumped over the lazy dogs and then they were walking home slowly\n" * 60
V, T = 120, 64


@pytest.fixture(scope="module")
def special() -> MaskTokens:
    return MaskTokens.of(get_tokenizer("wordpiece", TEXT, 60))


def sampler(special: MaskTokens, tokens: np.ndarray | None = None, batch_size: int = 16, **options) -> MaskedSampler:
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 60, 20_000) if tokens is None else tokens
    return MaskedSampler(tokens, T, batch_size, special, V, **{"seed": 3, **options})


def test_shares_of_what_is_chosen(special: MaskTokens):
    batch = sampler(special, next_sentence=False).batch_from(0, 2000)
    x, y = batch["input_ids"], batch["labels"]
    chosen = y != -100
    assert (chosen.sum(1) == round(0.15 * (T - 2))).all()  # of every row, as none of its tokens is special
    share = chosen.float().mean(0)[1:-1]
    assert (share - 9 / 62).abs().max() < 0.035  # four standard deviations of 2000 rows: 0.031
    masked = (x == special.mask) & chosen
    kept = (x == y) & chosen
    n = int(chosen.sum())
    assert abs(int(masked.sum()) / n - 0.8) < 0.012 and abs(int(kept.sum()) / n - 0.1 - 0.1 / V) < 0.01  # n: 18,000
    other = x[chosen & ~masked & ~kept]
    assert other.min() < 5 and other.max() >= V - 5  # of the whole vocabulary
    assert torch.equal(x[~chosen], batch["input_ids"].where(~chosen, 0)[~chosen])
    assert "next_sentence_label" not in batch and not batch["token_type_ids"].any()


def test_the_draws_are_those_of_philox(special: MaskTokens):
    """Row 5 of seed 3: the chosen positions have the smallest first words of the counters (j, 5, 0, "mask")."""
    batch = sampler(special, next_sentence=False).batch_from(5, 1)
    j = torch.arange(T)
    row = [torch.full_like(j, value) for value in (5, 0, MASKING_DOMAIN)]
    keys, what, which, _ = philox4x32((j, *row), 3)
    places = sorted(range(1, T - 1), key=lambda n: int(keys[n]))[:9]
    assert sorted(places) == (batch["labels"][0] != -100).nonzero().flatten().tolist()
    for n in places:
        is_mask, is_random = int(what[n]) < 0.8 * 2**32, int(what[n]) < 0.9 * 2**32
        wanted = special.mask if is_mask else int(which[n]) * V >> 32 if is_random else int(batch["labels"][0, n])
        assert int(batch["input_ids"][0, n]) == wanted


def test_rows_do_not_depend_on_the_batch_and_differ_by_row_and_seed(special: MaskTokens):
    whole = sampler(special).batch_from(0, 12)
    for first, count in ((0, 5), (5, 1), (6, 6)):
        part = sampler(special, batch_size=count).batch_from(first)
        assert all(torch.equal(part[name], whole[name][first : first + count]) for name in whole)
    other = sampler(special, seed=4).batch_from(0, 12)
    assert not torch.equal(other["input_ids"], whole["input_ids"])
    again = sampler(special).batch_from(sampler(special).rows_per_epoch, 12)  # the next epoch
    assert not torch.equal(again["labels"], whole["labels"])


def test_pairs_of_texts(tmp_path, special: MaskTokens):
    """Documents of one word each, so that a pair tells where it comes from."""
    words = ("foxes", "dogs", "lazy", "quick")
    (tmp_path / "texts").mkdir()
    for n in range(8):
        (tmp_path / f"texts/{n}.txt").write_text(f"{words[n % 4]} " * 400)
    tokenizer = get_tokenizer("wordpiece", TEXT, 400)  # of whole words
    data = prepare(tmp_path / "texts", tokenizer, tmp_path / "data", progress=False)
    special = MaskTokens.of(tokenizer)
    pairs = MaskedSampler(data.train, T, 8, special, tokenizer.vocab_size, probability=0.02)
    batch = pairs.batch_from(0, 400)
    x, y, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    rows = torch.where(y == -100, x, y)
    assert (rows[:, 0] == special.cls).all() and (rows[:, -1] == special.sep).all()
    assert ((types[:, 1:] - types[:, :-1]) >= 0).all() and (types[:, -1] == 1).all()
    sizes = (types == 0).sum(1) - 2  # of first texts
    least = (T - 3) // 4
    assert sizes.min() == least and sizes.max() == T - 3 - least
    assert (rows[torch.arange(400), sizes + 1] == special.sep).all()
    assert not torch.isin(y[y != -100], torch.from_numpy(special.specials)).any()
    elsewhere = batch["next_sentence_label"]
    assert 0.4 < elsewhere.float().mean() < 0.6  # four standard deviations: 0.1
    same = rows[torch.arange(400), sizes] == rows[torch.arange(400), sizes + 2]
    inside = (rows == special.sep).sum(1) == 2  # no document ends within the row
    assert same[inside & (elsewhere == 0)].all()
    assert same[elsewhere == 1].float().mean() < 0.45  # of 7 documents to train on another one has the same word


def test_whole_words(special: MaskTokens):
    """Words of one to five pieces: all pieces of a chosen word are chosen, until 15% of the tokens are."""
    continued, begins = (int(np.flatnonzero(x)[-1]) for x in (special.continues, ~special.continues))
    draw, tokens = np.random.default_rng(1), []
    while len(tokens) < 20_000:
        tokens += [begins, *[continued] * int(draw.integers(0, 5))]
    batch = sampler(special, np.array(tokens), whole_words=True, next_sentence=False).batch_from(0, 300)
    rows, chosen = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]), batch["labels"] != -100
    goes_on = torch.from_numpy(special.continues)[rows]
    goes_on[:, 1] = False  # a row may begin inside a word
    assert torch.equal(chosen[:, 1:][goes_on[:, 1:]], chosen[:, :-1][goes_on[:, 1:]])
    assert chosen.sum(1).min() >= 9 and chosen.sum(1).max() <= 9 + 4


def test_what_is_refused(special: MaskTokens):
    with pytest.raises(ValueError, match=r"needs a tokenizer with \[MASK\].*'char' has none"):
        MaskTokens.of(get_tokenizer("char", TEXT))
    with pytest.raises(ValueError, match="none was given"):
        MaskTokens.of(None)
    with pytest.raises(ValueError, match="block_size is 7; expected at least 8"):
        MaskedSampler(np.zeros(100, np.int64), 7, 1, special, V)
    with pytest.raises(ValueError, match="expected at least"):
        MaskedSampler(np.zeros(20, np.int64), T, 1, special, V)
    one = sampler(special, np.full(100, special.sep), next_sentence=False).batch_from(0, 1)
    assert (one["labels"] == -100).all()  # nothing but ends of documents
