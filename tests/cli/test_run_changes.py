"""Messages at the end of a run and on resuming with other options; another batch size; modes of files."""

from __future__ import annotations

import os
import shlex
import stat
import sys

import pytest
import torch
from safetensors.torch import load_file

from gptfast import _busy
from gptfast.cli._run import example_prompt
from gptfast.data import WindowSampler, load_prepared, prepare
from gptfast.training import language_modelling, read_checkpoint
from gptfast.training.log import read_log
from gptfast.training.progress import Figures
from tests.support.train_command import TEXT, gptfast, run


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does."""
    monkeypatch.setattr(_busy, "_times", lambda pid: None)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C after so many steps."""

    class Asked:
        times = 0

        def __enter__(self) -> Asked:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def signal(self) -> int | None:
            self.times += 1
            return 2 if self.times > steps else None

    monkeypatch.setattr("gptfast.training.loop.Interrupt", Asked)


def command_of(line: str) -> list[str]:
    return shlex.split(line[line.index("gptfast ") :])[1:]


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_an_early_interrupt_reports_what_was_saved(tmp_path, text, capsys, monkeypatch, steps):
    out = tmp_path / "my run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        assert run(text, out) == 130
    lines = capsys.readouterr().out.splitlines()
    if steps == 0:
        assert lines[-1] == "interrupted before the first step; nothing was saved"
        assert not (out / "last").exists()
        return
    name, first = ("last", f"there is no {out / 'best'} yet: it comes with the first evaluation, at step 3")
    if steps == 4:
        name, first = "best", f"interrupted at step 4; saved. Continue with: gptfast train --resume --out '{out}'"
    assert lines[-2] == first
    hint = command_of(lines[-1])
    assert hint[:3] == ["generate", "--model", str(out / name)]
    assert gptfast(*hint, "--max-new-tokens", "2") == 0
    assert capsys.readouterr().out.startswith(hint[-1])


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
def test_the_closing_hint_runs_as_it_is_printed(tmp_path, capsys, tokenizer):
    data = tmp_path / "it's.txt"
    data.write_text((TEXT + '\n\n  -- It\'s "so"; $HOME\n') * 3, encoding="utf-8")
    size = ["--vocab-size", "270"] if tokenizer == "bpe" else []
    assert run(str(data), tmp_path / "run", "--tokenizer", tokenizer, *size) == 0
    hint = command_of(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("generate")))
    assert gptfast(*hint, "--max-new-tokens", "2") == 0


def test_a_prompt_is_found_in_odd_texts(tmp_path):
    for n, (body, expected) in enumerate(
        [("\n \n- Ünd so weiter und so fort\n", "Ünd so weiter"), ("\n\n\n", ""), ("本" * 60, "本" * 8)]
    ):
        path = tmp_path / f"{n}.txt"
        path.write_text(body * 40)
        prepared = prepare(path, "char", tmp_path / str(n))
        start = len(prepared.val) - len(body) * (len(prepared.val) // len(body))
        whole = type(prepared)(
            prepared.folder, prepared.train, prepared.val._view(start, len(prepared.val)), prepared.tokenizer, {}
        )
        found = example_prompt(whole, 8 if n == 2 else 40)
        assert found == expected
        assert not found or len(prepared.tokenizer.encode(found)) <= 40


def test_a_jump_of_the_learning_rate_is_reported_with_the_option_that_avoids_it(tmp_path, text, capsys):
    steps = ["--max-steps", "40", "--eval-every", "40", "--log-every", "1", "--learning-rate", "2e-3"]
    assert run(text, tmp_path / "run", *steps) == 0
    more = ["train", "--resume", "--out", tmp_path / "run"]
    assert gptfast(*more, "--max-steps", "41", "--lr-decay-steps", "40") == 0
    assert "and is now" not in capsys.readouterr().out
    assert (
        gptfast(*more, "--max-steps", "200", "--lr-decay-steps", "200", "--max-minutes", "0.0001") == 1
    )  # out of time
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        assert gptfast(*more, "--max-steps", "200", "--lr-decay-steps", "200") == 130
    said = capsys.readouterr().out
    rates = {r["step"]: r["lr"] for r in read_log(tmp_path / "run" / "log.jsonl") if "lr" in r}
    assert f"the learning rate was {rates[41]:.3g} and is now {rates[42]:.3g}; --lr-decay-steps 40 keeps it" in said
    assert rates[42] > 5 * rates[41]


def test_another_batch_size_continues_at_the_same_place_of_the_data(tmp_path, text, capsys, monkeypatch):
    out, seen, evaluated = tmp_path / "run", [], []
    rows = WindowSampler.batch_from
    monkeypatch.setattr(
        WindowSampler, "batch_from", lambda self, row: seen.append((row, self.batch_size)) or rows(self, row)
    )
    batches = language_modelling.evaluation_batches
    monkeypatch.setattr(
        language_modelling, "evaluation_batches", lambda *args: evaluated.append(args[2:4]) or batches(*args)
    )
    assert run(text, out, "--max-steps", "6") == 0
    more = ["--batch-size", "6", "--grad-accum", "2", "--max-steps", "9"]
    assert gptfast("train", "--resume", "--out", out, *more) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a step now sees 192 tokens instead of 64: the text continues where it was" in said
    assert seen == [(4 * n, 4) for n in range(6)] + [(24 + 6 * n, 6) for n in range(6)]
    assert set(evaluated) == {(4, 2)}  # the losses compare
    changed = [r for r in read_log(out / "log.jsonl") if "batch_size" in r]
    assert [(r["step"], r["batch_size"], r["grad_accum"]) for r in changed] == [(6, 6, 2)]
    state = read_checkpoint(out / "last").state
    assert (state.step, state.rows, state.eval_batch_size) == (9, 60, 4)
    assert gptfast("train", "--resume", "--out", out, "--max-steps", "10") == 0  # keeps the new size
    assert (
        seen[-2:] == [(60, 6), (66, 6)]
        and "instead of" not in capsys.readouterr().out.split("resume ")[1].split("until")[0]
    )


def test_a_checkpoint_without_row_counts_resumes_bit_for_bit(tmp_path, text):
    """As one of an older gptfast."""
    from gptfast.training import checkpoint as module

    options = ["--lr-decay-steps", "6"]
    assert run(text, tmp_path / "whole", *options, "--max-steps", "6") == 0
    with pytest.MonkeyPatch.context() as patch:
        full = module.asdict
        drop = ("rows", "eval_batch_size")
        patch.setattr(module, "asdict", lambda x: {k: v for k, v in full(x).items() if k not in drop})
        assert run(text, tmp_path / "parts", *options, "--max-steps", "3") == 0
    assert read_checkpoint(tmp_path / "parts" / "last").state.rows is None
    assert gptfast("train", "--resume", "--out", tmp_path / "parts", "--max-steps", "6") == 0
    a, b = (load_file(tmp_path / out / "last" / "model.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_have_the_modes_that_the_umask_gives(tmp_path, text, umask):
    before = os.umask(umask)
    try:
        assert run(text, tmp_path / "new" / "run", "--max-steps", "3") == 0
        load_prepared(tmp_path / "new" / "run" / "data").tokenizer.save(tmp_path / "new" / "tokenizer")
        lock = sys.modules["gptfast._locks"].FileLock(tmp_path / "new" / "lock")
        assert lock.acquire() is None
        found = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in found}
        lock.release()
    finally:
        os.umask(before)
    names = {path.name for path in found}
    assert {
        "model.safetensors",
        "optimizer.safetensors",
        "train.bin",
        "log.jsonl",
        "loss.png",
        "best",
        "last",
        "lock",
    } <= names
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in found if path.name != "lock"}
    assert {path: mode for path, mode in modes.items() if mode != expected.get(path, 0o666 & ~umask)} == {}


def test_a_line_has_a_validation_loss_where_it_is_new():
    figures = Figures(3, 90, 4.25, 4.3, None, None, None, val_is_new=False)
    assert figures.line() == "step 3/90  loss 4.2500"
    figures.val_is_new = True
    assert figures.line() == "step 3/90  loss 4.2500  val 4.3000"


@pytest.mark.parametrize(("waited", "busy"), [(0.6, True), (0.05, False)])
def test_a_run_reports_a_busy_machine(tmp_path, text, capsys, monkeypatch, waited, busy):
    clock = iter([(0, 0), (int(9e9 * (1 - waited)), int(9e9 * waited))])
    monkeypatch.setattr(_busy, "_times", lambda pid: next(clock))
    assert run(text, tmp_path / "run") == 0
    assert ("the machine is busy: for 60% of its time the training waited" in capsys.readouterr().out) == busy
    assert _busy.busy_line(None) is None
