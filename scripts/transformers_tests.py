"""transformers' own tests of GPT-2 and GPT-1, with their modeling, generation and pipeline mixins, on patched models.

    git clone --depth 1 https://github.com/huggingface/transformers      # of a version near the installed one
    pip install parameterized
    python scripts/transformers_tests.py transformers                    # options after the folder go to pytest: -k cache

They run twice: on models as they are, and on models that `gptfast.accelerate` has patched as soon as they were made or loaded.
Tests that need a network fail or are skipped both times. Prints the tests that fail on patched models only, and ends with 1 if
there is one; a test that fails there is repeated, as some of these tests draw random numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

FILES = ("tests/models/gpt2/test_modeling_gpt2.py", "tests/models/openai/test_modeling_openai.py")
MODULES = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.openai.modeling_openai")
REPEATS = 3
Outcomes = dict[str, list[str]]  # of each test: passed, failed or skipped, and why


class Recorder:
    """A plugin of pytest that keeps what each test came to."""

    def __init__(self) -> None:
        self.outcomes: Outcomes = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        known = self.outcomes.get(report.nodeid, ["passed"])
        if report.outcome == "failed" or (report.outcome == "skipped" and known[0] == "passed"):
            lines = str(report.longrepr).strip().splitlines() or [""]
            self.outcomes[report.nodeid] = [report.outcome, next((x for x in lines if x.startswith("E ")), lines[-1])]
        else:
            self.outcomes.setdefault(report.nodeid, ["passed", ""])


def patch_every_model() -> list[str]:
    """From here on each GPT-2 and GPT-1 of this process is patched when it has been made or loaded; returns a list that gets the
    class of each."""
    import torch
    from transformers import PreTrainedModel

    import gptfast

    patches: list[str] = []
    depth = 0  # of constructors and loaders that call one another; the outermost one patches

    def patched(made: Any) -> Any:
        model = made[0] if isinstance(made, tuple) else made
        ours = isinstance(model, PreTrainedModel) and type(model).__module__ in MODULES
        if ours and not any(parameter.is_meta for parameter in model.parameters()):
            dtypes = {parameter.dtype for parameter in model.parameters()}
            if not hasattr(type(model), "gptfast_original") and torch.float64 not in dtypes:
                patches.append(type(model).__name__)
                gptfast.accelerate(model)
        return made

    def outermost(call: Callable[..., Any], result: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                made = call(first, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                patched(result(first, made))
            return made

        return wrapped

    for name in MODULES:
        for kind in vars(import_module(name)).values():
            if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.__module__ == name:
                kind.__init__ = outermost(kind.__init__, lambda model, _: model)
    loader = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(outermost(loader, lambda _, made: made))
    return patches


def run_here(patch: bool, out: Path, arguments: list[str]) -> None:
    """Run pytest in this process and write the outcomes."""
    import pytest
    import transformers  # noqa: F401 (the installed one, before the checkout's own is on the path)

    patches = patch_every_model() if patch else []
    recorder = Recorder()
    code = pytest.main(arguments, plugins=[recorder])
    if code not in (0, 1):
        sys.exit(int(code))
    if patch:
        print(f"{len(patches)} models were patched: {', '.join(sorted(set(patches))) or 'none'}", file=sys.stderr)
    out.write_text(json.dumps(recorder.outcomes))


def run(checkout: Path, patch: bool, arguments: Iterable[str]) -> Outcomes:
    """Run the tests in a process of their own, in the checkout."""
    plain = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--no-header", "--tb=line", "-W", "ignore"]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.json"
        command = [sys.executable, __file__, "--here", str(out), *(["--patch"] if patch else []), str(checkout)]
        done = subprocess.run(
            [*command, *plain, *arguments], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True
        )
        if not out.exists():
            sys.exit(f"{done.stdout}\npytest ended with {done.returncode} before it had run the tests")
        return json.loads(out.read_text())


def failures(outcomes: Outcomes) -> set[str]:
    return {name for name, (outcome, _) in outcomes.items() if outcome == "failed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkout", type=Path, help="a checkout of transformers; its tests run on the installed package"
    )
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--patch", action="store_true", help=argparse.SUPPRESS)
    given, arguments = parser.parse_known_args()
    if given.here:
        run_here(given.patch, given.here, arguments)
        return 0
    checkout = given.checkout.resolve()
    missing = [name for name in FILES if not (checkout / name).is_file()]
    if missing:
        sys.exit(f"{checkout} has no {missing[0]}; expected a checkout of transformers with its tests")
    before, after = (run(checkout, patch, [*arguments, *FILES]) for patch in (False, True))
    for title, outcomes in (("as they are", before), ("patched", after)):
        counts = Counter(outcome for outcome, _ in outcomes.values())
        print(f"{title:12} " + ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped")))
    if before.keys() != after.keys():
        print("the two runs did not have the same tests")
        return 1
    worse = failures(after) - failures(before)
    for _ in range(REPEATS - 1):
        if worse:
            worse &= failures(run(checkout, True, sorted(worse)))
    if worse:
        worse -= failures(run(checkout, False, sorted(worse)))
    hidden = {name for name in after if after[name][0] == "skipped" and before[name][0] == "passed"}
    for name in sorted(worse | hidden):
        print(f"{after[name][0]} on patched models only: {name}\n    {after[name][1]}")
    mended = failures(before) - failures(after)
    if mended:
        print(f"{len(mended)} fail on unpatched models only: {', '.join(sorted(mended))}")
    return int(bool(worse or hidden))


if __name__ == "__main__":
    sys.exit(main())
