"""gptfast watch: a run in progress, or one that has ended."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast._options import Whole, option, values_of
from gptfast.cli._options import Change, Options, takes

if TYPE_CHECKING:
    from rich.console import Console

    from gptfast.cli._watch_show import Sample
    from gptfast.training.watching import Watched

_LARGE = 1 << 30  # bytes of weights from which on a sample is drawn only where one is asked for


@dataclass(frozen=True)
class Viewing:
    """How `gptfast watch` looks at a run."""

    run: Path = option(MISSING, "RUN, the folder that gptfast train or gptfast finetune writes.")
    once: bool = option(False, "Print one view and end. So it is where standard output is no terminal.")
    json: bool = option(False, "Print one view as a JSON object and end.")
    every: float = option(2.0, "Seconds between looks.")
    wait: bool = option(False, "Where there is no run yet, wait until it begins.")
    samples: bool | None = option(
        None,
        "At each new checkpoint let RUN/last write a few words, with one thread of this machine.",
        words="where the weights have less than 1 GB",
    )
    prompt: str | None = option(None, "What samples continue.", words="the end-of-text token, or a new line")
    tokens: int = option(60, "Tokens of a sample.", allowed=Whole(1))


@takes(Options(Viewing, changes={"run": Change(argument=True), "samples": Change(both=True)}))
def watch(options: dict[str, Any]) -> None:
    """Watch a training run: losses, learning rate, speed, alarms and a sample of what it writes; also after its end.

    It reads RUN/log.jsonl and RUN/last, changes nothing, and may be started and ended at any time (Ctrl-C).
    It ends when the run does.

    [bold]Examples[/]

      [cyan]gptfast watch runs/bard[/]

      [cyan]gptfast watch runs/bard --once --no-samples[/]

      [cyan]gptfast watch runs/bard --json[/]
    """
    from rich.console import Console

    viewing = Viewing(**values_of(Viewing, options))
    if viewing.every <= 0:
        raise ValueError(f"watch: `every` is {viewing.every:g}; expected more than 0 seconds")
    console = Console(highlight=False, soft_wrap=True)
    view = _Viewer(viewing, console)
    if viewing.json:
        from gptfast.cli._watch_show import as_json

        print(json.dumps(as_json(*view.look())))
    elif viewing.once or not console.is_terminal:
        console.print(view.drawn())
    else:
        view.follow()


class _Viewer:
    """Looks at a run, and remembers the sample of its newest checkpoint."""

    def __init__(self, viewing: Viewing, console: Console) -> None:
        self._viewing, self._console = viewing, console
        self._sample: Sample | None = None

    def look(self) -> tuple[Watched, Sample | None]:
        from gptfast.training.watching import watch_run

        waits = False
        while True:
            try:
                run = watch_run(self._viewing.run)
                break
            except FileNotFoundError:
                if not self._viewing.wait:
                    raise
                if not waits:
                    print(f"waiting for a run in {self._viewing.run}", file=sys.stderr)
                waits = True
                time.sleep(self._viewing.every)
        saved = None if run.checkpoint is None else run.checkpoint.state.step
        if (
            self._viewing.samples is not False
            and saved is not None
            and (self._sample is None or self._sample.step != saved)
        ):
            self._sample = self._new_sample(run.out / "last", saved)
        return run, self._sample

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
                    time.sleep(self._viewing.every)
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
        if self._viewing.samples is None and weights > _LARGE:
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
        prompt = self._viewing.prompt
        end = tokenizer.eos_id
        if prompt is not None:
            ids = tokenizer.encode(prompt)
        else:
            ids, prompt = ([end], "") if end is not None else (tokenizer.encode("\n"), "")
        room = model.config.block_size - len(ids)
        if room < 1 or not ids:
            raise ValueError(f"the prompt has {len(ids)} tokens; expected 1 to {model.config.block_size - 1}")
        new = model.generate([ids], max_new_tokens=min(self._viewing.tokens, room), temperature=0.8, seed=0)[0][
            len(ids) :
        ]
        return Sample(0, prompt, tokenizer.decode(new))
