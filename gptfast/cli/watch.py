"""gptfast watch: a run in progress, or one that has ended."""

from __future__ import annotations

from typing import Any

from gptfast._json import to_text
from gptfast._options import values_of
from gptfast.cli._options import Change, Options, takes
from gptfast.cli._watch_viewer import Viewer, Viewing


@takes(Options(Viewing, changes={"run": Change(argument=True), "samples": Change(both=True)}))
def watch(options: dict[str, Any]) -> None:
    """Watch a training run: losses, learning rate, speed, alarms and a sample of what it writes; also after its end.

    It reads RUN/log.jsonl and RUN/last, changes nothing, and may be started and ended at any time (Ctrl-C).
    It ends when the run does; with --serve it goes on.

    [bold]Examples[/]

      [cyan]gptfast watch runs/bard[/]

      [cyan]gptfast watch runs/bard --once --no-samples[/]

      [cyan]gptfast watch runs/bard --json[/]

      [cyan]gptfast watch runs/bard --serve[/]
    """
    from rich.console import Console

    viewing = Viewing(**values_of(Viewing, options))
    if viewing.every <= 0:
        raise ValueError(f"watch: `every` is {viewing.every:g}; expected more than 0 seconds")
    if not 0 <= viewing.port < 65536:
        raise ValueError(f"watch: `port` is {viewing.port}; expected 0 to 65535 (0: any free one)")
    if viewing.serve and (viewing.once or viewing.json):
        raise ValueError("watch: `serve` shows the run until Ctrl-C; leave out `once` and `json`")
    console = Console(highlight=False, soft_wrap=True)
    view = Viewer(viewing, console)
    if viewing.serve:
        from gptfast.cli._watch_page import serve_page

        serve_page(view)
    elif viewing.json:
        from gptfast.cli._watch_show import as_json

        print(to_text(as_json(*view.look())))
    elif viewing.once or not console.is_terminal:
        console.print(view.drawn())
    else:
        view.follow()
