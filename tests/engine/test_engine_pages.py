"""The engine's pages of keys and values: counted after every step of any history, shared until a row writes, freed after.

A page holds 64 positions. What goes wrong there shows late: as memory that grows, or as one sequence that another wrote to.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.backend import has_cpu_ops
from gptfast.engine import EngineRunner
from gptfast.generation.sampling import SamplingParams
from tests.support.engine_models import model_of, relative_error

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")

PAGE, SPARE = 64, 8  # positions; pages that are kept for the next sequence
EDGES = [1, 62, 63, 64, 65, 126, 127, 128, 129]


class Rows:
    """A runner, and what each of its slots should hold: the text, and the pages that it shares with others."""

    def __init__(self, runner: EngineRunner) -> None:
        self.runner, self.texts, self.pages = runner, {}, {}
        (row,) = runner.allocate()
        runner.extend([row], [[0]])
        self.page_bytes = runner.nbytes
        runner.free(row)

    def add(self, like: int | None = None) -> int:
        (row,) = self.runner.allocate() if like is None else self.runner.fork(like, 1)
        self.texts[row], self.pages[row] = ([], []) if like is None else (self.texts[like][:], self.pages[like][:])
        return row

    def copy(self, rows: list[int], sources: list[int]) -> None:
        self.runner.copy(rows, sources)
        held = [(self.texts[s][:], self.pages[s][:]) for s in sources]
        for row, (text, pages) in zip(rows, held, strict=True):
            self.texts[row], self.pages[row] = text, pages

    def truncate(self, row: int, length: int) -> None:
        self.runner.truncate(row, length)
        self.texts[row] = self.texts[row][:length]
        self.pages[row] = self.pages[row][: -(-length // PAGE)]

    def free(self, row: int) -> None:
        self.runner.free(row)
        del self.texts[row], self.pages[row]

    def extend(self, rows: list[int], new: list[list[int]]) -> torch.Tensor:
        logits = self.runner.extend(rows, new)
        for row, tokens in zip(rows, new, strict=True):
            self._append(row, tokens)
        return logits

    def decode(self, rows: list[int], logits: torch.Tensor, max_tokens: int) -> None:
        params = [SamplingParams(1.0, 0, 1.0, row, 0) for row in rows]
        for row, tokens in zip(rows, self.runner.decode_steps(rows, logits, max_tokens, params), strict=True):
            self._append(row, tokens[:-1])

    def _append(self, row: int, tokens: list[int]) -> None:
        text, pages = self.texts[row], self.pages[row]
        first = len(text) // PAGE
        text += tokens
        if tokens and first < len(pages):
            pages[first:] = [object()]  # its own from now on, or was before
        pages += [object() for _ in range(-(-len(text) // PAGE) - len(pages))]

    def check(self) -> None:
        needed = len({id(page) for pages in self.pages.values() for page in pages})
        held, rest = divmod(self.runner.nbytes, self.page_bytes)
        assert rest == 0 and needed <= held <= needed + SPARE, f"{held} pages are held, {needed} needed"
        assert self.runner.lengths == [len(self.texts.get(row, [])) for row in range(self.runner.max_slots)]


def step(rows: Rows, chance: random.Random, most: int) -> list[tuple[int, torch.Tensor]]:
    """One random action; the rows that it extended, with their logits."""
    texts = rows.texts
    action = chance.choice(["add", "fork", "copy", "truncate", "free", "extend", "extend", "decode"])
    if action == "add" and len(texts) < rows.runner.max_slots:
        rows.add()
    elif action == "fork" and texts and len(texts) < rows.runner.max_slots:
        rows.add(like=chance.choice(list(texts)))
    elif action == "copy" and texts:
        targets = chance.sample(list(texts), chance.randint(1, len(texts)))
        rows.copy(targets, [chance.choice(list(texts)) for _ in targets])
    elif action == "truncate" and texts:
        row = chance.choice(list(texts))
        length = chance.choice([*EDGES, chance.randint(0, most)])
        rows.truncate(row, min(length, len(texts[row])))
    elif action == "free" and len(texts) > 3:
        for row in chance.sample(list(texts), chance.choice([1, 1, 1, len(texts) - 1])):
            rows.free(row)
    elif action in ("extend", "decode"):
        chosen = [row for row in texts if len(texts[row]) < most - 5 and chance.random() < 0.7]
        if not chosen:
            return []
        new = [[chance.randrange(301) for _ in range(_how_many(len(texts[row]), most - 4, chance))] for row in chosen]
        logits = rows.extend(chosen, new)
        if action == "extend":
            return list(zip(chosen, logits.clone(), strict=True))
        rows.decode(chosen, logits, chance.choice([1, 4]))
    return []


def _how_many(length: int, most: int, chance: random.Random) -> int:
    """Tokens to append: a few, or up to the edge of a page, or one beyond."""
    edge = -length % PAGE
    return min(chance.choice([1, 2, 17, edge or PAGE, edge + 1]), most - length)


@pytest.mark.parametrize(("cache_dtype", "seed"), [("float32", 0), ("bfloat16", 4)])
def test_any_history_gives_the_logits_of_the_text_and_holds_the_pages_it_needs(cache_dtype, seed):
    """Over page boundaries, against a row that was just made."""
    model, chance = model_of("gpt2").compile_for_inference("float32", cache_dtype=cache_dtype), random.Random(seed)
    rows, fresh = Rows(model.runner(6)), model.runner(1)
    held = [0]
    for _ in range(250):
        extended = step(rows, chance, 150)
        rows.check()
        held.append(rows.runner.nbytes // rows.page_bytes)
        for row, logits in extended[:1]:
            (one,) = fresh.allocate()
            assert torch.equal(logits, fresh.extend([one], [rows.texts[row]])[0])
            fresh.free(one)
    assert max(held) > SPARE + 5 and any(a > b for a, b in pairwise(held)), "none of its pages was freed"


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("how", ["fork", "copy", "truncate"])
def test_what_one_row_writes_no_copy_sees(how, length):
    """Copies of a text that ends anywhere in a page, written to in turn, the source last; then each goes on."""
    model = model_of("gpt2").compile_for_inference("float32")
    rows, chance = Rows(model.runner(3)), random.Random(length)
    text = [chance.randrange(301) for _ in range(length + 3)]
    source = rows.add()
    rows.extend([source], [text if how == "truncate" else text[:length]])
    others = [rows.add(like=None if how == "copy" else source) for _ in range(2)]
    if how == "copy":
        rows.copy(others, [source] * 2)
    for row in (source, *others) if how == "truncate" else ():
        rows.truncate(row, length)
    rows.check()
    for row in (*others, source):
        rows.extend([row], [[row + 1, row + 2]])
        rows.check()
    last = rows.extend([*others, source], [[9]] * 3)
    rows.check()
    for row, logits in zip([*others, source], last, strict=True):
        assert torch.equal(logits, model.logits(rows.texts[row])[-1]), f"row {row}"


def test_pages_beyond_the_spare_ones_are_freed():
    rows = Rows(model_of("gpt2").compile_for_inference("float32").runner(6))
    for _ in range(3):
        filled = [rows.add() for _ in range(6)]
        rows.extend(filled, [[1] * 150] * 6)
        assert rows.runner.nbytes == 18 * rows.page_bytes
        rows.truncate(filled[0], 1)
        for row in filled:
            rows.free(row)
            rows.check()
        assert rows.runner.nbytes == SPARE * rows.page_bytes


def test_beams_hold_no_more_than_their_pages(monkeypatch):
    """Each step of beam search copies rows over rows: what the overwritten ones held is freed."""
    model, seen, copy = model_of("gpt2").compile_for_inference("float32"), [], EngineRunner.copy

    def counted(self, slots, sources):
        copy(self, slots, sources)
        seen.append((self.nbytes, sum(-(-length // PAGE) for length in self.lengths)))

    monkeypatch.setattr(EngineRunner, "copy", counted)
    model.generate([[1, 2, 3]], num_beams=4, max_new_tokens=130)
    page = Rows(model.runner(1)).page_bytes
    assert len(seen) > 100
    assert all(held <= (most + SPARE) * page for held, most in seen)


def test_large_pages():
    """Of 2 MB and more, which ask the system for large pages of memory: 32 layers of 128."""
    config = GPTConfig(n_layer=32, n_head=4, n_embd=128, n_inner=16, block_size=130, vocab_size=50, dropout=0.0)
    torch.manual_seed(0)
    model = GPT(config).eval()
    ids = torch.randint(50, (1, 130))
    compiled = model.compile_for_inference("float32")
    with torch.no_grad():
        assert relative_error(compiled.logits(ids), model.double()(ids)) < 2e-6  # measured 2.4e-7
    rows = Rows(compiled.runner(2))
    assert rows.page_bytes >= 2 << 20
    source = rows.add()
    rows.extend([source], [ids[0, :100].tolist()])
    copy = rows.add(like=source)
    last = [rows.extend([row], [[row] * 30])[0] for row in (copy, source)]
    rows.check()
    for row, logits in zip((copy, source), last, strict=True):
        assert torch.equal(logits, compiled.logits(rows.texts[row])[-1])


BANDED = {"n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "block_size": 700, "vocab_size": 301, "window": 70}


def banded(pattern: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**BANDED, attention_pattern=pattern, position_embedding="rotary", dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


class BandedRows(Rows):
    """Counts no pages: which ones are dropped depends on the stretches in which a text was read."""

    def check(self) -> None:
        assert self.runner.lengths == [len(self.texts.get(row, [])) for row in range(self.runner.max_slots)]


@pytest.mark.parametrize(("pattern", "seed"), [("SL", 1), ("SSS", 2)])
def test_any_history_of_banded_layers_gives_the_logits_of_the_text(pattern, seed):
    """Cuts far back are read again."""
    model, chance = banded(pattern).compile_for_inference("float32"), random.Random(seed)
    rows, fresh = BandedRows(model.runner(4)), model.runner(1)
    for _ in range(250):
        short = [row for row, text in rows.texts.items() if len(text) < 400]
        if short and chance.random() < 0.3:
            rows.extend([chance.choice(short)], [[chance.randrange(301) for _ in range(280)]])
        extended = step(rows, chance, 690)
        rows.check()
        for row, logits in extended[:1]:
            (one,) = fresh.allocate()
            assert torch.equal(logits, fresh.extend([one], [rows.texts[row]])[0])
            fresh.free(one)


def test_pages_of_banded_layers_are_bounded_by_the_window():
    """Behind a long text as beside one that is read token by token; against torch."""
    model = banded("SSS")
    compiled = model.compile_for_inference("float32")
    runner, ids = compiled.runner(2), torch.randint(301, (1, 600), generator=torch.Generator().manual_seed(1))
    first, second = runner.allocate(2)
    logits = runner.extend([first], ids.tolist(), last_only=False)[0]
    for token in ids[0, :400].tolist():
        last = runner.extend([second], [[token]])
    with torch.no_grad():
        wanted = model(ids)[0]
    assert relative_error(logits, wanted) < 2e-6 and torch.equal(last[0], logits[399])
    layer = (8 + 16) * PAGE * 4  # keys of one head, and its values, padded to 16 channels
    held, rest = divmod(runner.nbytes, 3 * layer)
    # positions that are seen, 64 more, and a pass of 256 in its pages; of the other row one
    assert rest == 0 and held <= -(-(70 + 64 + 256) // PAGE) + 1 + -(-(70 + 64) // PAGE) + 2 + SPARE
    for length in range(600, 690):
        runner.extend([first], [[length % 301]])
    assert runner.nbytes == held * 3 * layer, "it grows with the text"
    mixed = banded("LLS").compile_for_inference("float32").runner(1)
    (row,) = mixed.allocate()
    mixed.extend([row], ids.tolist())
    assert 20 * layer < mixed.nbytes <= (20 + 8 + SPARE) * layer, "ten pages of two layers, and few of the third"


def test_a_cut_beyond_the_window_reads_the_text_again():
    model = banded("SL").compile_for_inference("float32")
    ids = torch.randint(301, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    runner = model.runner(3)
    prefix = torch.randn(80, 16, generator=torch.Generator().manual_seed(2))
    (plain,), (behind,) = runner.allocate(1), runner.allocate(1, prefix=prefix)
    for row in (plain, behind):
        whole = runner.extend([row], [ids], last_only=False)[0]
        for length in (590, 520, 300, 64, 1):
            runner.truncate(row, length)
            assert torch.equal(runner.extend([row], [ids[length : length + 1]])[0], whole[length])
            runner.truncate(row, length)
