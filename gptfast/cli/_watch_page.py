"""`gptfast watch --serve`: the view of a run as a page in the browser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptfast._plots import Points
from gptfast.cli._names import as_options
from gptfast.cli._watch_show import as_json

if TYPE_CHECKING:
    from gptfast.cli._watch_viewer import Viewer
    from gptfast.training.watching import Watched

_POINTS = 1000  # of a curve at most: more than a picture has columns
_CURVES = {"loss": ("task_loss", "loss"), "val_loss": ("val_loss",), "lr": ("lr",), "tokens_per_second": ("tokens_per_second",)}  # fmt: skip


def serve_page(viewer: Viewer) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ImportError: fastapi or uvicorn is not installed.  OSError: the port is taken; or there is no run, and it is not waited
            for.  ValueError: the run's files are damaged.
    """
    try:
        from gptfast.serving.run_page import create_run_app, run_view
        from gptfast.serving.server import bind
    except ImportError as error:
        raise ImportError(f"watch: {error.name} is not installed; pip install 'gptfast-kernels[serve]'") from None
    viewing = viewer.viewing
    if not viewing.wait:
        viewer.see()  # what is wrong is said here, not in the browser
    app = create_run_app(lambda: run_of(viewer), lambda: samples_of(viewer), viewing.every)
    with bind("127.0.0.1", viewing.port) as bound:
        port = bound.getsockname()[1]
        print(f"{viewing.run} is shown at http://127.0.0.1:{port}/ (Ctrl-C ends the view, not the run)", flush=True)
        run_view(app, bound)


def run_of(viewer: Viewer) -> dict[str, Any]:
    """What the page shows of a run: its view as JSON and its curves; or why there is none."""
    viewing = viewer.viewing
    about = {"run": str(viewing.run), "every": viewing.every}
    try:
        run = viewer.see()
    except FileNotFoundError as error:
        return {**about, "state": "waiting", "message": as_options(str(error))}
    except (OSError, ValueError) as error:
        return {**about, "state": "damaged", "message": as_options(str(error))}
    return {**as_json(run, None), **about, "curves": {name: _curve(run, keys) for name, keys in _CURVES.items()}}


def samples_of(viewer: Viewer) -> list[dict[str, Any]]:
    """The samples of the newest checkpoints, the newest last."""
    with contextlib.suppress(OSError, ValueError):  # `run_of` says what is wrong
        viewer.draw_sample(viewer.see())
    return [vars(sample) for sample in viewer.samples]


def _curve(run: Watched, keys: Sequence[str]) -> Points:
    """The points of the first key that the log has."""
    found = next((curve for key in keys if (curve := run.curve(key))), [])
    return thinned([point for point in found if math.isfinite(point[1])], _POINTS)


def thinned(points: Points, most: int) -> Points:
    """At most `most` points of a curve that look like all of it: its ends stay, and of each part the lowest and the highest."""
    if len(points) <= most:
        return points
    parts = most // 2 - 1
    kept = {0, len(points) - 1}
    for n in range(parts):
        part = range(n * len(points) // parts, (n + 1) * len(points) // parts)
        kept |= {min(part, key=lambda k: points[k][1]), max(part, key=lambda k: points[k][1])}
    return [points[k] for k in sorted(kept)]
