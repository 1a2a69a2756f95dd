"""The log and the progress display of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gptfast import machine
from gptfast.training.log import Log, read_log
from gptfast.training.progress import Figures, TrainingProgress, clock
from tests.support.training import QUICK, file_size_limit, make_trainer


def test_a_log_that_cannot_grow_names_the_file(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    message = (
        r"cannot write .*log.jsonl: File too large; raise the limit .*ulimit -f.* and continue the run with `resume`"
    )
    with file_size_limit(90), pytest.raises(OSError, match=message):
        _ = [log.write(step=step, loss=4.0) for step in range(1, 10)]  # 25 bytes each
    log.close()
    steps = [r["step"] for r in read_log(tmp_path / "log.jsonl")]
    assert steps == [1, 2, 3]  # the cut line is left out


def test_a_log_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[1, 2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: the content is a list of 2; .* not a record"):
        Log(tmp_path / "log.jsonl", step=2)


def test_tensorboard_files_or_what_to_install(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install tensorboard"):
            make_trainer(tmp_path, tensorboard=True)
    else:
        make_trainer(tmp_path, QUICK.replace(max_steps=3), tensorboard=True).train()
        assert list((tmp_path / "tensorboard").iterdir())


def test_without_a_terminal_progress_is_lines_of_known_figures():
    console = Console(file=io.StringIO(), width=200)
    with TrainingProgress(console=console) as progress:
        progress.show(Figures(1, None, 4.5, None, None, None, None))
        progress.show(Figures(2, 90, 4.4, 4.3, 1234.5, 41.2, 65.0))  # too soon after the first, and not important
        progress.show(Figures(3, 90, 4.25, 4.3, 1234.5, 41.2, 65.0), important=True)
    expected = ["step 1/?  loss 4.5000"]
    expected += ["step 3/90  loss 4.2500  val 4.3000  1,234 tokens/s  41% of peak  ETA 1:05"]
    assert console.file.getvalue().splitlines() == expected
    assert clock(3723) == "1:02:03"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132])
def test_the_bar_keeps_step_and_time_in_a_narrow_terminal(width):
    screen = io.StringIO()
    progress = TrainingProgress(console=Console(file=screen, force_terminal=True, width=width, highlight=False))
    with progress:
        progress.show(Figures(1850, 20000, 5.0412, 5.5646, 21997.0, 42.0, 65.0))
    last = screen.getvalue().split("\x1b[?25h")[0].splitlines()[-1]
    for part in ("1850/20000", "loss 5.0412", "ETA 1:05"):
        assert part in last, last
    assert "…" not in last
    shown = {60: "val 5.5646", 80: "21,997 tokens/s  ", 100: "42% of peak"}
    assert all(text.strip() in last for least, text in shown.items() if width >= least)


def test_percent_of_peak_is_never_above_100(tmp_path, monkeypatch):
    """A peak that was measured while the machine was busy is left out, and measured again at each evaluation."""
    measured = iter([1e3, 2e15, 1.0])
    monkeypatch.setattr(machine, "_measure_peak", lambda dtype, device: next(measured))
    monkeypatch.setattr(machine, "_peaks", {})
    trainer = make_trainer(tmp_path, QUICK.replace(max_steps=9, eval_every=7, eval_batches=1))
    figures = []
    monkeypatch.setattr(trainer.progress, "show", lambda shown, important=False: figures.append(shown))
    trainer.train()
    assert trainer.peak_flops == 2e15, "the largest of all measurements"
    shares = {f.step: f.percent_of_peak for f in figures}
    assert shares[6] is None, "more than the peak: the measurement was wrong"
    assert shares[8] is not None
    assert shares[8] <= 100
