"""What `gptfast watch` looks at: a run, and samples of its checkpoints."""

from __future__ import annotations

import sys
import time
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast._options import Whole, option

if TYPE_CHECKING:
    from rich.console import Console

    from gptfast.cli._watch_show import Sample
    from gptfast.training.watching import Watched

_KEPT = 5  # samples
_LARGE = 1 << 30  # bytes of weights from which on a sample is drawn only where one is asked for


@dataclass(frozen=True)
class Viewing:
    """How `gptfast watch` looks at a run."""

    run: Path = option(MISSING, "RUN, the folder that gptfast train or gptfast finetune writes.")
    once: bool = option(False, "Print one view and end. So it is where standard output is no terminal.")
    json: bool = option(False, "Print one view as a JSON object and end.")
    serve: bool = option(
        False, "Show the run as a page in the browser, on this machine alone; also after its end, until Ctrl-C."
    )
    port: int = option(8001, "The port of that page; 0: any free port.")
    every: float = option(2.0, "Seconds between looks.")
    wait: bool = option(False, "Where there is no run yet, wait until it begins.")
    samples: bool | None = option(
        None,
        "At each new checkpoint let RUN/last write a few words, with one thread of this machine.",
        words="where the weights have less than 1 GB",
    )
    prompt: str | None = option(None, "What samples continue.", words="the end-of-text token, or a new line")
    tokens: int = option(60, "Tokens of a sample.", allowed=Whole(1))


class Viewer:
    """Looks at a run, and remembers the samples of its newest checkpoints.

    samples: the newest last.
    """

    def __init__(self, viewing: Viewing, console: Console) -> None:
        self.viewing, self._console = viewing, console
        self.samples: list[Sample] = []

    def look(self) -> tuple[Watched, Sample | None]:
        """The run, for which it waits where that is asked for, and the sample of its newest checkpoint."""
        waits = False
        while True:
            try:
                run = self.see()
                break
            except FileNotFoundError:
                if not self.viewing.wait:
                    raise
                if not waits:
                    print(f"waiting for a run in {self.viewing.run}", file=sys.stderr)
                waits = True
                time.sleep(self.viewing.every)
        self.draw_sample(run)
        return run, self.samples[-1] if self.samples else None

    def see(self) -> Watched:
        from gptfast.training.watching import watch_run

        return watch_run(self.viewing.run)

    def draw_sample(self, run: Watched) -> None:
        """Add a sample if there is a new checkpoint."""
        if self.viewing.samples is False or run.checkpoint is None:
            return
        step = run.checkpoint.state.step
        if not self.samples or self.samples[-1].step != step:
            kept = [one for one in self.samples if one.step < step and not one.note]  # a run may go back
            self.samples = [*kept, self._new_sample(run.out / "last", step)][-_KEPT:]

    def drawn(self) -> Any:
        return self._drawn(*self.look())

    def _drawn(self, run: Watched, sample: Sample | None) -> Any:
        from gptfast.cli._watch_show import view

        utf8 = self._console.encoding.lower().startswith("utf")
        return view(run, sample, self._console.width, self._console.height, utf8)

    def follow(self) -> None:
        """Draw until the run ends, or Ctrl-C."""
        from rich.live import Live

        run, sample = self.look()
        try:
            with Live(self._drawn(run, sample), console=self._console, auto_refresh=False) as live:
                live.refresh()
                while run.state in ("starting", "running"):
                    time.sleep(self.viewing.every)
                    run, sample = self.look()
                    live.update(self._drawn(run, sample), refresh=True)
        except KeyboardInterrupt:  # the way to leave; the run goes on
            return

    def _new_sample(self, folder: Path, step: int) -> Sample:
        """A text that a checkpoint writes, or the reason why there is none."""
        from gptfast.cli._watch_show import Sample
        from gptfast.models.stored import is_complete

        if not is_complete(folder):
            return Sample(
                step, note="no sample: the checkpoint holds adapters or the head of a task, not a whole model"
            )
        weights = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
        if self.viewing.samples is None and weights > _LARGE:
            return Sample(step, note=f"no sample: the weights have {weights / 1e9:.1f} GB; draw one with --samples")
        try:
            return replace(self._written(folder), step=step)
        except (OSError, ValueError, RuntimeError) as error:  # the run is saved just now, or has no tokenizer
            return Sample(step, note=f"no sample: {' '.join(str(error).split())}")

    def _written(self, folder: Path) -> Sample:
        import torch

        from gptfast.cli._load import load
        from gptfast.cli._watch_show import Sample

        torch.set_num_threads(1)  # the training needs the others
        model, tokenizer = load(str(folder), None)
        prompt = self.viewing.prompt
        end = tokenizer.eos_id
        if prompt is not None:
            ids = tokenizer.encode(prompt)
        else:
            ids, prompt = ([end], "") if end is not None else (tokenizer.encode("\n"), "")
        room = model.config.block_size - len(ids)
        if room < 1 or not ids:
            raise ValueError(f"the prompt has {len(ids)} tokens; expected 1 to {model.config.block_size - 1}")
        new = model.generate([ids], max_new_tokens=min(self.viewing.tokens, room), temperature=0.8, seed=0)[0][
            len(ids) :
        ]
        return Sample(0, prompt, tokenizer.decode(new))
