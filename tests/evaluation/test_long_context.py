"""Loss by position, keys in haystacks, and `gptfast evaluate` with both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.data import Document
from gptfast.evaluation import Settings, logprobs, loss_by_position, needle_test
from gptfast.evaluation.needle import HAYSTACK, NEEDLE, QUESTION
from gptfast.generation import TorchRunner, torch_runner
from gptfast.tokenizer import CharTokenizer
from tests.support.train_command import _argv, _threads, gptfast  # noqa: F401  fixtures

LETTERS = CharTokenizer.train(HAYSTACK + NEEDLE + QUESTION + "0123456789\n")
TEXT = HAYSTACK * 3


def small(block_size: int = 16, **more: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": LETTERS.vocab_size, "dropout": 0.0}
    model = GPT(GPTConfig(**sizes, block_size=block_size, **more)).eval()
    for p in model.parameters():
        p.data *= 3
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_each_position_has_the_loss_of_its_tokens(packed: bool):
    model, context = small(), 12
    ids = LETTERS.encode(TEXT)
    losses: list[list[float]] = [[] for _ in range(context)]
    for start in range(0, len(ids), context):
        window = torch.tensor([ids[start : start + context]])
        with torch.no_grad():
            logprobs = model(window)[0].double().log_softmax(-1)
        for t in range(1, window.shape[1]):
            losses[t].append(-float(logprobs[t - 1, window[0, t]]))
    judged = model.compile_for_inference("float32") if packed else model
    documents = [Document("text", TEXT)]
    found = loss_by_position(judged, documents, LETTERS, Settings(context=context), bins=context)
    assert [row["first"] for row in found["positions"]] == list(range(1, context))
    for row, wanted in zip(found["positions"], losses[1:], strict=True):
        assert row["tokens"] == len(wanted)
        assert row["loss"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    wide = loss_by_position(judged, documents, LETTERS, Settings(context=context), bins=2)["positions"]
    assert [(row["first"], row["last"]) for row in wide] == [(1, 5), (6, 11)]
    assert sum(row["tokens"] for row in wide) == found["tokens"] == sum(map(len, losses))
    with pytest.raises(ValueError, match="stride is 4 and context 12; windows do not overlap"):
        loss_by_position(judged, documents, LETTERS, Settings(context=context, stride=4))


class Reader:
    """A model that knows the task and sees its last `sight` tokens."""

    own_threads = False

    def __init__(self, sight: int, room: int = 600) -> None:
        self.config, self.sight, self.seen = SimpleNamespace(block_size=room), sight, []
        self.longest = 0

    def runner(self, max_slots: int, max_len: int) -> Reader:
        return self

    def allocate(self) -> list[int]:
        self.seen = []
        return [0]

    def free(self, slot: int) -> None:
        self.longest = max(self.longest, len(self.seen) + 1)  # the last token of the key is never read

    def extend(self, slots: list[int], tokens: list[list[int]], last_only: bool = True) -> Any:
        rows = []
        for token in tokens[0]:
            self.seen.append(token)
            rows.append(torch.zeros(LETTERS.vocab_size))
            known = re.search(r"key is (\d{5})\.", LETTERS.decode(self.seen[-self.sight :]))
            written = LETTERS.decode(self.seen).rpartition(QUESTION)[2]
            if known and len(written) < 6:
                rows[-1][LETTERS.encode(f" {known[1]}")[len(written)]] = 1.0
        return rows[-1][None] if last_only else [torch.stack(rows)]


def test_a_key_is_found_where_it_can_be_seen():
    for sight, expected in ((600, [[1.0] * 3] * 2), (130, [[0.0, 0.0, 1.0]] * 2), (310, [[1.0] * 3, [0.0, 1.0, 1.0]])):
        model = Reader(sight)
        found = needle_test(model, LETTERS, lengths=[300, 500], depths=3, trials=2)
        assert found["found"] == expected, sight
        assert model.longest == 500
        assert found["accuracy"] == pytest.approx(sum(map(sum, expected)) / 6)
    again = needle_test(Reader(600), LETTERS, haystack="Here we go. ", depths=1, trials=1)
    assert (again["lengths"], again["depths"], again["accuracy"]) == ([150, 300, 600], [0.5], 1.0)
    for given, text in (
        ({"lengths": [90]}, "length is 90; expected at least"),
        ({"lengths": [700]}, "length is 700; expected at most 600 "),
        ({"haystack": ""}, "haystack is empty"),
        ({"depths": 0}, "depths is 0"),
    ):
        with pytest.raises(ValueError, match=text):
            needle_test(Reader(600), LETTERS, **given)
    with pytest.raises(ValueError, match="context is 64 tokens; needle and question alone take"):
        needle_test(Reader(600, 64), LETTERS)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, size in (("short", 128), ("long", 160)):
        small(size).save_pretrained(tmp_path / name)
        LETTERS.save(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    both, data = ("--compare", tmp_path / "short", tmp_path / "long"), ("--data", tmp_path / "text.txt")
    assert gptfast("evaluate", *both, *data, "--by-position", "--out", tmp_path / "a", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [row["positions"][-1]["last"] for row in results] == [127, 159]
    assert (
        gptfast("evaluate", *both, *data, "--needle", "--lengths", "120,128", "--trials", 1, "--out", tmp_path / "b")
        == 0
    )
    assert "1 keys at each length and depth, seed 0" in capsys.readouterr().out
    saved = json.loads((tmp_path / "b/results.json").read_text())["results"]
    assert [row["lengths"] for row in saved] == [[120, 128]] * 2
    for picture in ("a/positions.png", "b/needle.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    one = ("evaluate", "--model", tmp_path / "short")
    for options, text in (
        ((), "give --data, a text to predict, --task, items to solve, or --needle"),
        (("--needle", "--by-position"), "--needle and --by-position are two evaluations"),
        (("--needle", "--stride", 4), "--stride does not go with --needle"),
        (("--task", "copying", "--by-position"), "--by-position does not go with --task"),
        ((*data, "--depths", 3), "--depths goes with --needle"),
        (("--needle", "--lengths", "1k"), "--lengths is '1k'; expected whole numbers such as 1024,4096"),
        (("--needle", "--trials", 0), "--trials is 0"),
        ((*data, "--by-position", "--stride", 4), "windows do not overlap here"),
    ):
        assert gptfast(*one, *options) == 1
        assert text in capsys.readouterr().err, options


def test_a_prompt_in_parts_has_the_logits_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    """What torch runs reads a long prompt some tokens at a time: its memory is that of keys, values and a part."""
    rotary = {"position_embedding": "rotary", "attention_pattern": "SL", "window": 5, "attention_sinks": True}
    widths: list[int] = []
    for more in ({}, rotary):
        model = small(40, **more)
        widths.clear()
        ids = torch.randint(LETTERS.vocab_size, (33,), generator=torch.Generator().manual_seed(1)).tolist()
        with torch.no_grad():
            wanted = model(torch.tensor([ids]))[0]
        model.register_forward_pre_hook(lambda _, args, given: widths.append(given["ids"].shape[1]), with_kwargs=True)
        monkeypatch.setattr(torch_runner, "PREFILL", 7)
        runner = TorchRunner(model, 1, 40)
        (slot,) = runner.allocate()
        torch.testing.assert_close(runner.extend([slot], [ids[:30]])[0], wanted[29])
        assert (widths, runner.lengths) == ([7, 7, 7, 7, 2], [30])
        torch.testing.assert_close(runner.extend([slot], [ids[30:]], last_only=False)[0], wanted[30:])
        runner.truncate(slot, 3)
        torch.testing.assert_close(runner.extend([slot], [ids[3:]], last_only=False)[0], wanted[3:])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_long_windows_are_read_in_parts(monkeypatch: pytest.MonkeyPatch, softcap: float | None):
    model, documents = small(32, logit_softcap=softcap), [Document("text", TEXT)]
    wanted = loss_by_position(model, documents, LETTERS)
    widest: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: widest.append(out.shape[-2]))
    monkeypatch.setattr(logprobs, "LONG", 16)
    monkeypatch.setattr(logprobs, "PIECE", 5)
    found = loss_by_position(model, documents, LETTERS)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    assert [row["loss"] for row in found["positions"]] == pytest.approx([row["loss"] for row in wanted["positions"]])
    assert max(widest) == 5
